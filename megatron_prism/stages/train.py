"""Train: a checkpoint (or random weights) and a blend become checkpoints, on any number of ranks under torchrun.

An output folder that was begun by the same recipe is taken up at its newest complete checkpoint. The run is finished, and COMPLETE, after
`steps` steps; one that stopped at its time limit or on a signal is not (status 75), and goes on when it is started again.
"""

import os
from pathlib import Path

from megatron_prism.engine import data_plan
from megatron_prism.engine.recipe import TrainConfig, check, check_start, parents
from megatron_prism.planning import checkpoints, cost

__all__ = ["Config", "dry_run", "parents", "run"]

Config = TrainConfig


def dry_run(cfg: TrainConfig) -> None:
    """Print mesh, parameters, bytes per rank by kind, tokens, FLOPs, and what each source of data gives; for WORLD_SIZE ranks, else the fewest."""
    check_start(cfg)
    world_size = int(os.environ.get("WORLD_SIZE", cfg.parallel.model_ranks))
    model, plan = check(cfg, world_size)
    print(cost.describe_run(model, plan, cfg.steps, cfg.global_batch, cfg.data.seq_len, cfg.training))
    print(checkpoints.describe(model, plan, cfg.data.seq_len, cfg.training, cfg.checkpoint.async_save))
    print(data_plan.describe(cfg))
    if cfg.evaluation is not None:
        from megatron_prism.evals import inline

        print(inline.describe(cfg, cfg.evaluation))


def run(cfg: TrainConfig) -> Path:
    """Train, on every rank of the launch; returns the run's folder. Errors: StoppedEarly where it was told to stop."""
    check(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    data_plan.check(cfg)
    evaluate = None
    if cfg.evaluation is not None:
        from megatron_prism.evals.inline import InlineEvaluation

        evaluate = InlineEvaluation(cfg, cfg.evaluation)
    from megatron_prism.engine import calendar, loop, parallel, run_lock, watchdog

    watchdog.record_flights(cfg.output)
    with run_lock.held(cfg.output), parallel.ending():
        loop.train(cfg, evaluate)
        calendar.stopped_early(cfg.output)
    return cfg.output
