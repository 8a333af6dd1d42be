"""The RL loop: builds a run from its recipe, then owns the calendar: write, grade, train, move the reference, log, save, export, stop.

Called on every rank. Generation and training take turns: what a step writes is written with the weights of that step (strictly on-policy, whatever
`updates_per_batch` then makes of it); or, with `rollout.steps_ahead`, the next step's responses are written meanwhile. Every decision is a function
of what all ranks hold, so that no rank waits for another.
Owns: the order, the state that a checkpoint needs beside the engine's (what the alarms and `solved_from_zero` remember), and that a step which fails
in any way has left nothing behind. Refuses: nothing of its own; the recipe, the parts and the alarms do.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from megatron_prism import artifact
from megatron_prism.engine import calendar, checkpoint, device, integrity, leftovers, parallel, run_folder, watchdog
from megatron_prism.engine.calendar import HF_FILES, Evaluate, every
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.loop import build_engine, carry_model_files
from megatron_prism.engine.metrics import MetricsLog, read_records
from megatron_prism.engine.policy import PolicyReport, log_probabilities, policy_step
from megatron_prism.engine.ranks import any_rank, on_main
from megatron_prism.engine.reference_model import Reference
from megatron_prism.engine.saving import Background
from megatron_prism.engine.schedule import factor
from megatron_prism.engine.step import DivergenceError, Engine
from megatron_prism.engine.stop_time import StopTime
from megatron_prism.errors import UserError
from megatron_prism.evals.inline import apart
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.generate import Generator
from megatron_prism.grading import Pool
from megatron_prism.planning import cost
from megatron_prism.rl import ahead, generators, metrics, recipe, samples_page
from megatron_prism.rl.ahead import Ahead, Written
from megatron_prism.rl.alarms import CollapseError, Watch, check_mismatch
from megatron_prism.rl.batch import Batch, batch_of, sequence_of
from megatron_prism.rl.objective import policy_loss
from megatron_prism.rl.prompts import PromptSet, load_prompts
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.rl.rewards import rewards
from megatron_prism.rl.rollouts import Draw, Group, grouped

GROUP_TIMEOUT_MINUTES = 180
"""ranks wait for each other's responses, and all for rank 0's graders"""


@dataclass
class Run(calendar.Run):
    """A run in progress, on one rank. generator: None on ranks that write nothing. pool: rank 0's graders."""

    cfg: RLConfig
    model_config: ModelConfig
    engine: Engine
    prompts: PromptSet
    tokenizer: Any
    generator: Generator | None
    pool: Pool | None
    reference: Reference | None
    parents: list[Path]
    progress: Progress
    log: MetricsLog
    watch: Watch
    unsolved: metrics.Unsolved
    evaluate: Evaluate | None = None
    generator_step: int | None = None
    """the step whose weights the generator has; None: those that it was opened with"""
    ahead: Ahead = field(default_factory=Ahead)
    """responses of the next step"""
    started: float = field(default_factory=time.monotonic)
    stop_asked: bool = False
    background: Background | None = None
    stop_time: StopTime = field(default_factory=StopTime)


def reinforce(cfg: RLConfig, evaluate: Evaluate | None = None) -> Path:
    """Run a recipe to its end, from its newest checkpoint where there is one. Returns the run's folder.

    evaluate: what scores the checkpoints of the steps that `evaluation.interval` divides.
    """
    with ExitStack() as closing:
        run = build_run(cfg, closing)
        run.evaluate = evaluate
        closing.enter_context(calendar.attended(run))
        finished = _loop(run)
    if finished and run.is_main:
        shutil.rmtree(cfg.output / generators.GENERATOR, ignore_errors=True)
        artifact.complete(cfg.output)
    return cfg.output


def build_run(cfg: RLConfig, closing: ExitStack) -> Run:
    """Start the process groups, build engine, reference and generator, and put them where the run stands. closing: ends what was opened."""
    place = device.setup(cfg.device)
    if cfg.deterministic:
        device.make_deterministic()
    parallel.start(place, GROUP_TIMEOUT_MINUTES)
    on_main(lambda: leftovers.remove(cfg.output, cfg.stage))
    newest = integrity.choose(cfg.output, cfg.stage, cfg.checkpoint.on_corrupt)
    model_config, plan = recipe.check(cfg, dist.get_world_size())
    mesh = parallel.build_mesh(plan, cfg.seed)
    parents = recipe.parents(cfg)
    if mesh.rank == 0:
        artifact.begin(cfg.output, cfg.stage, cfg, parents)
        watchdog.make_room(cfg.output)
        carry_model_files(cfg.training)
    dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(cfg.output / HF_FILES, local_files_only=True, trust_remote_code=False)
    generators.check_marks(cfg, tokenizer)
    prompts = load_prompts(cfg.prompts, tokenizer, cfg.longest_prompt)
    engine = build_engine(cfg.training, model_config, mesh, place)
    progress, reference = _starting_point(cfg, engine, prompts, newest)
    log = MetricsLog(cfg.output, cfg.log, progress.step, cfg.steps, enabled=mesh.rank == 0, settings=cfg.model_dump(mode="json"))
    closing.callback(log.close)
    generator = generators.open_generator(cfg, mesh.rank, newest)
    if generator is not None:
        closing.callback(generator.close)
    pool = closing.enter_context(Pool(cfg.grading_workers or max(1, len(os.sched_getaffinity(0)) // 2))) if mesh.rank == 0 else None
    watch = Watch.of(cfg.alarms.window, progress.data.get("watch"))
    unsolved = metrics.Unsolved(set(progress.data.get("unsolved", ())))
    run = Run(cfg, model_config, engine, prompts, tokenizer, generator, pool, reference, parents, progress, log, watch, unsolved)
    run.background = Background() if cfg.checkpoint.async_save else None
    if cfg.rollout.steps_ahead and newest is not None:
        run.ahead.load(newest, partial(_drawing, run))
    if run.is_main:
        samples_page.drop_after(cfg.output, progress.step)
    log.say(f"{plan.describe()}; {cost.num_parameters(model_config):,} parameters; from step {progress.step} of {cfg.steps}")
    log.say(describe(prompts.describe()))
    return run


def describe(found: Mapping[str, Any]) -> str:
    """The prompts of a run, for people: domains, and what was dropped."""
    domains = ", ".join(f"{count:,} {domain}" for domain, count in found["domains"].items())
    long = sum(source["too_long"] for source in found["sources"])
    return f"{found['prompts']:,} prompts: {domains}" + (f"; {long:,} were too long and dropped" if long else "")


def _starting_point(cfg: RLConfig, engine: Engine, prompts: PromptSet, newest: Path | None) -> tuple[Progress, Reference | None]:
    """Load what there is to load: the run's own checkpoint with its reference, or the weights that it starts from, which are the reference.

    newest: as rank 0 chose it for all: a network's file system may show the ranks' machines different folders for a minute.
    """
    if newest is None:
        start = cfg.model.checkpoint
        assert start is not None
        checkpoint.load_weights(engine, on_main(lambda: run_folder.resolve(start)))
        return Progress(data={"prompts": prompts.digest}), _reference(cfg, engine)
    progress, reference = checkpoint.load_all(engine, newest, checked=True), _reference(cfg, engine)
    if progress.data["prompts"] != prompts.digest:
        raise UserError(f"the prompts, or their order, are others than those of {newest}; restore [prompts], or choose another output")
    if reference is not None:
        reference.load(engine, newest)
    return progress, reference


def _reference(cfg: RLConfig, engine: Engine) -> Reference | None:
    return Reference(engine, cfg.reference_on_host) if cfg.objective.reference is not None else None


# --- the calendar ------------------------------------------------------------------------------------------------------------------------------


def _loop(run: Run) -> bool:
    """Steps until the end (True) or until someone asks to stop (False). A step that fails ends the run, and its error names what is left."""
    cfg, progress = run.cfg, run.progress
    if calendar.owes_evaluation(run):
        generators.sleep(cfg, run.generator)
    calendar.make_good(run)
    while progress.step < cfg.steps:
        with _named(run):
            groups, batch, found = _step(run)
        stopping = any_rank(run.wants_to_stop, run.engine.device)
        _log(run, found)
        if every(cfg.samples.interval, progress.step) or run.is_last or progress.step == 1:
            _keep_samples(run, groups, batch)
        if not calendar.after_step(run, stopping, partial(_save, run)):
            return False
    return True


def _step(run: Run) -> tuple[list[Group], Batch, dict[str, Any]]:
    cfg, progress, seconds = run.cfg, run.progress, dict[str, float]()
    with _timed(seconds, "sync"):
        generators.wake(cfg, run.generator)
        sync(run)
    with _timed(seconds, "generation"), apart():
        drawn = _drawn(run)
        probed = _probed(run, drawn)
        _draw_ahead(run)
        generators.sleep(cfg, run.generator)
    written = drawn.responses
    with _timed(seconds, "grading"):
        earned = on_main(lambda: rewards(written, cfg.reward, _graders(run), cfg.rollout.max_new_tokens))
    groups = grouped(written, earned, cfg.rollout.responses_per_prompt)
    batch = batch_of(groups, cfg.objective)
    if run.reference is not None and batch.sequences:
        with _timed(seconds, "reference"), run.reference.in_place(run.engine):
            batch = batch.with_row("reference", log_probabilities(run.engine, batch.sequences, cfg.packing))
    with _timed(seconds, "training"):
        report = _update(run, batch)
    with _timed(seconds, "generation"):
        run.ahead.wait()
    progress.step += 1
    progress.samples += len(written)
    progress.tokens += batch.num_tokens
    if run.reference is not None and cfg.objective.reference == "soft" and every(cfg.objective.reference_interval, progress.step):
        run.reference.move_towards(run.engine, cfg.objective.reference_alpha)
    found = metrics.with_probe(_figures(run, groups, report), probed) | metrics.speeds(
        seconds, sum(sum(one.written) for one in written), drawn.seconds, batch.num_tokens
    )
    _judge(run, found)
    return groups, batch, found


def _drawing(run: Run, step: int) -> Draw:
    """What is to be written for a step, with the weights of now."""
    cfg, version = run.cfg, run.progress.step
    prompts, writers = run.prompts.prompts_at(step), generators.writers(cfg)
    return Draw(prompts, cfg.rollout, cfg.seed, step, version, writers, beside=cfg.generation.backend == "vllm")


def _drawn(run: Run) -> Written:
    """The responses of this step: written ahead, or now."""
    step = run.progress.step
    drawn = run.ahead.take(step)
    if drawn is None:
        run.ahead.begin(_drawing(run, step), run.generator)
        drawn = run.ahead.take(step)
    assert drawn is not None
    return drawn


def _draw_ahead(run: Run) -> None:
    """Have the next step's responses written from here on, where the recipe says so."""
    following = run.progress.step + 1
    if run.cfg.rollout.steps_ahead and following < run.cfg.steps:
        run.ahead.begin(_drawing(run, following), run.generator)


def _probed(run: Run, drawn: Written) -> dict[str, float]:
    """With responses of older weights: by how many steps, and what the generator is off by at equal weights."""
    if not run.cfg.rollout.steps_ahead:
        return {}

    def logp(chosen: list[int]) -> list[Any]:
        return log_probabilities(run.engine, [sequence_of(drawn.responses[place]) for place in chosen], run.cfg.packing)

    off = ahead.mismatch(drawn.responses, run.generator, logp)
    return {"lag": float(drawn.draw.step - drawn.draw.version)} | ({} if off is None else {"mismatch": off})


def sync(run: Run) -> None:
    """Give the generators the trainer's weights, unless they have them. Called on every rank."""
    if run.generator_step == run.progress.step:
        return
    generators.update(run.cfg, run.generator, run.engine, run.model_config, run.progress.step)
    run.generator_step = run.progress.step


def _graders(run: Run) -> Pool:
    assert run.pool is not None
    return run.pool


def _update(run: Run, batch: Batch) -> PolicyReport | None:
    """The optimizer's steps on one batch; None where nothing takes part in it."""
    cfg = run.cfg
    if not batch.sequences:
        return None
    if cfg.objective.updates_per_batch > 1:
        batch = batch.with_row("old", log_probabilities(run.engine, batch.sequences, cfg.packing))

    def objective(logp_t: Tensor, rows: dict[str, Tensor], segment_t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(logp_t, rows, cfg.objective, segment_t)

    for _ in range(cfg.objective.updates_per_batch):
        report = policy_step(run.engine, batch.sequences, objective, cfg.packing, _lr(run), cfg.optimizer.weight_decay)
    return report


def _lr(run: Run) -> float:
    return run.cfg.optimizer.lr * factor(run.cfg.schedule, run.progress.step, run.cfg.steps)


def _figures(run: Run, groups: Sequence[Group], report: PolicyReport | None) -> dict[str, Any]:
    """What the step is remembered by; equal on every rank."""
    found: dict[str, Any] = metrics.figures(groups, run.unsolved.settle(groups), {prompt.domain for prompt in run.prompts.prompts})
    found["lr"] = run.cfg.optimizer.lr * factor(run.cfg.schedule, run.progress.step - 1, run.cfg.steps)
    found |= {"updated": float(report is not None), "tokens": run.progress.tokens, "responses": run.progress.samples}
    return found | (metrics.training(report.loss, report.grad_norm, report.sums) if report is not None else {})


def _judge(run: Run, found: dict[str, Any]) -> None:
    """Let the alarms see the step. Errors: CollapseError."""
    run.watch.see(found)
    wrong = check_mismatch(found["mismatch"], run.cfg.alarms) if found["updated"] else None
    wrong = wrong or run.watch.alarm(run.cfg.alarms)
    if wrong is not None:
        run.log.event(run.progress.step, found, metrics.line(run.progress.step, run.cfg.steps, found))
        raise CollapseError(wrong)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    with nullcontext() if phase == "training" else watchdog.long_phase(phase):
        yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun


@contextmanager
def _named(run: Run) -> Iterator[None]:
    """Inside, an error of a step says which it was, and where to go on from."""
    step = run.progress.step + 1
    try:
        yield
    except (UserError, DivergenceError) as error:
        raise type(error)(f"step {step}: {error}. Nothing of this step was saved; {_last_good(run, isinstance(error, CollapseError))}") from error
    except Exception as error:  # memory that ran out, say: what it is stays as it is
        error.add_note(f"in step {step}. Nothing of this step was saved; {_last_good(run, collapsed=False)}")
        raise


def _last_good(run: Run, collapsed: bool) -> str:
    """Where to go on from: after a collapse from before the window that showed it, where such a checkpoint was kept."""
    there = run_folder.complete_steps(run.cfg.output)
    before = run.progress.step - run.cfg.alarms.window
    early = [folder for folder in there if int(folder.name.removeprefix("step_")) <= before]
    if not there:
        return f"no checkpoint was saved yet: the run begins anew from {run.cfg.model.checkpoint}"
    if not collapsed:
        return f"the newest checkpoint is {there[-1]}: start the same command again to go on from it"
    if early:
        return f"the last good checkpoint is {early[-1]}, from before the window that this was seen in"
    return f"the newest checkpoint is {there[-1]}, from within the window that this was seen in (checkpoint.keep_every keeps older ones)"


# --- what a run leaves -------------------------------------------------------------------------------------------------------------------------


def _log(run: Run, found: dict[str, Any]) -> None:
    step = run.progress.step
    run.log.event(step, found, metrics.line(step, run.cfg.steps, found))


def _keep_samples(run: Run, groups: Sequence[Group], batch: Batch) -> None:
    if not run.is_main:
        return
    cfg = run.cfg
    samples_page.keep(cfg.output, run.progress.step, groups, batch.advantages_pg, run.tokenizer.decode)
    steps = [line for line in read_records(cfg.output) if "reward" in line]
    samples_page.write_page(cfg.output, steps, cfg.samples.shown_steps, cfg.samples.shown_prompts)


def _save(run: Run) -> None:
    run.progress.data |= {"watch": run.watch.state(), "unsolved": sorted(run.unsolved.ids)}

    def beside(folder: Path) -> None:
        run.ahead.save(folder)
        if run.reference is not None:
            run.reference.save(run.engine, folder)

    calendar.save(run, run.cfg, beside)
