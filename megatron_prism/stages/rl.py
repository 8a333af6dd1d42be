"""RL: a checkpoint becomes a policy, by reinforcement learning with verifiable rewards, on any number of ranks under torchrun.

Prompts -> responses -> rewards -> advantages -> a step of the weights, again and again. An output folder that was begun by the same recipe is taken
up at its newest complete checkpoint. The run is finished, and COMPLETE, after `steps` steps; one that stopped at its time limit, on SIGTERM or at an
alarm is not. docs/rl.md.
"""

import os
from pathlib import Path

from megatron_prism.planning import cost
from megatron_prism.rl.recipe import RLConfig, check, parents

__all__ = ["Config", "dry_run", "parents", "run"]

Config = RLConfig


def dry_run(cfg: RLConfig) -> None:
    """Print mesh, parameters, bytes per rank, what a step asks and how much it may write; for WORLD_SIZE ranks, else the fewest. No torch."""
    model, plan = check(cfg, int(os.environ.get("WORLD_SIZE", cfg.parallel.model_ranks)))
    need = cost.memory(model, plan, cfg.buffer_tokens, cfg.training.training)
    value_bytes = cfg.training.training.value_bytes
    responses, rollout = cfg.prompts.prompts_per_step * cfg.rollout.responses_per_prompt, cfg.rollout
    copies = [("generator", 2 if cfg.generation.dtype != "float32" else 4, cfg.generation.backend == "transformers")]
    copies += [("reference", value_bytes, cfg.objective.reference is not None)]
    print(f"mesh         {plan.describe()}")
    print(f"parameters   {cost.num_parameters(model):,} ({model.family})")
    print(f"training     {cost.readable_bytes(need.total)} on the fullest rank, buffers of {cfg.buffer_tokens:,} tokens (estimate)")
    for name, size, there in copies:
        if there:
            share = cost.num_parameters(model) / (1 if name == "generator" else plan.tp * plan.pp)
            print(f"{name:<12} {cost.readable_bytes(size * share)} of weights on each rank, beside" + (" its cache" if name == "generator" else ""))
    print(f"a step       {cfg.prompts.prompts_per_step:,} prompts x {rollout.responses_per_prompt} = {responses:,} responses, {cfg.steps:,} steps")
    print(f"tokens       at most {responses * rollout.context:,} a step ({rollout.context:,} of a prompt with its response)")
    print(f"updates      {cfg.objective.updates_per_batch} a step, lr {cfg.optimizer.lr:g} {cfg.schedule.kind}")
    for source in cfg.prompts.sources:
        what = f"{source.count:,} questions of {source.task}" if source.task is not None else f"the lines of {source.file}"
        print(f"prompts      {what}" + (f" as {source.domain}" if source.domain is not None else ""))


def run(cfg: RLConfig) -> Path:
    """Train the policy, on every rank of the launch; returns the run's folder. Errors: StoppedEarly where it was told to stop."""
    check(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    evaluate = None
    if cfg.evaluation is not None:
        from megatron_prism.evals.inline import InlineEvaluation

        evaluate = InlineEvaluation(cfg.training, cfg.evaluation)
    from megatron_prism.engine import calendar, parallel, run_lock, watchdog
    from megatron_prism.rl import loop

    watchdog.record_flights(cfg.output)
    with run_lock.held(cfg.output), parallel.ending():
        loop.reinforce(cfg, evaluate)
        calendar.stopped_early(cfg.output)
    return cfg.output
