"""The training loop: builds a run from its recipe, then takes its steps: step, log, validate; save, export, evaluate and stop are `calendar`'s.

Called on every rank. What happens when is decided from the step alone, or told to all ranks together, so that no rank waits for another for ever.
"""

import gc
import shutil
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism import artifact
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.history import consumption, describe_consumption, recorded
from megatron_prism.engine import (
    bad_steps,
    calendar,
    checkpoint,
    device,
    flash_attention,
    garbage,
    integrity,
    leftovers,
    origin,
    parallel,
    recipe,
    recovery,
    run_folder,
    stragglers,
    tp_overlap,
    watchdog,
)
from megatron_prism.engine.bad_steps import Memory
from megatron_prism.engine.calendar import HF_FILES, Evaluate, every
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.cuda_graphs import MicroBatchGraphs, draw_nothing
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.metrics import MetricsLog
from megatron_prism.engine.model import BuildOptions, Chunk, attention_obstacle, build, uses_transformer_engine
from megatron_prism.engine.optimizer import build_optimizer, wrap_model
from megatron_prism.engine.packed_data import PackedReader, open_reader
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.ranks import on_all, on_main
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.saving import Background
from megatron_prism.engine.schedule import factor
from megatron_prism.engine.step import Engine, StepReport, evaluate_step, train_step
from megatron_prism.engine.stop_time import StopTime
from megatron_prism.engine.trainable import freeze
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import cost


@dataclass
class Run(calendar.Run):
    """A run in progress, on one rank."""

    cfg: TrainConfig
    model_config: ModelConfig
    engine: Engine
    data: SampleReader
    held_out: SampleReader | None
    parents: list[Path]
    progress: Progress
    log: MetricsLog
    memory: Memory = field(default_factory=Memory)
    """of bad steps"""
    evaluate: Evaluate | None = None
    started: float = field(default_factory=time.monotonic)
    recent: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=50))
    """seconds, tokens, and seconds waited for data of the last steps"""
    stop_asked: bool = False
    background: Background | None = None
    stop_time: StopTime = field(default_factory=StopTime)

    def close(self) -> None:
        """End the log and the threads that read data."""
        self.log.close()
        for reader in (self.data, self.held_out):
            if reader is not None:
                reader.close()


def train(cfg: TrainConfig, evaluate: Evaluate | None = None) -> Path:
    """Run a recipe to its end, from its newest checkpoint where there is one. Returns the run's folder.

    evaluate: what scores the checkpoints of the steps that `evaluation.interval` divides.
    """
    run = build_run(cfg)
    run.evaluate = evaluate
    try:
        with calendar.attended(run), garbage.by_hand(cfg.gc_interval):
            finished = _loop(run)
    finally:
        run.close()
    if finished and run.is_main:
        artifact.complete(cfg.output)  # after the log is closed: TensorBoard's writer has a thread of its own
    return cfg.output


def _loop(run: Run) -> bool:
    """Steps until the end (True) or until someone asks to stop (False)."""
    cfg = run.cfg
    calendar.make_good(run)
    while run.progress.step < cfg.steps:
        report = _step(run)
        step = run.progress.step
        if report.applied and (every(cfg.log.interval, step) or run.is_last or step == 1):
            _log(run, report)
        if recovery.has_spiked(run, report):
            with watchdog.long_phase("going back"):
                recovery.roll_back(run, report)
            continue
        if cfg.validation and (every(cfg.validation.interval, step) or run.is_last):
            _validate(run)
        if not calendar.after_step(run, bool(report.signal), partial(_save, run)):
            return False
        if garbage.is_due(cfg.gc_interval, step, worked=every(cfg.checkpoint.save_interval, step)):
            gc.collect()
    run.log.say(describe_consumption(recorded(run.data.fingerprint), run.progress.samples, cfg.data.seq_len))
    return True


def build_run(cfg: TrainConfig) -> Run:
    """Start the process groups, build the engine, and put it where the run stands: its own newest checkpoint, its start, or random weights."""
    place = device.setup(cfg.device)
    if cfg.deterministic:
        device.make_deterministic()
    parallel.start(place)
    on_main(lambda: (bad_steps.finish_rollbacks(cfg.output), leftovers.remove(cfg.output, cfg.stage)))
    newest = integrity.choose(cfg.output, cfg.stage, cfg.checkpoint.on_corrupt)
    model_config, plan = recipe.check(cfg, dist.get_world_size())
    mesh = parallel.build_mesh(plan, cfg.seed)
    parents = recipe.parents(cfg)
    if mesh.rank == 0:
        artifact.begin(cfg.output, cfg.stage, cfg, parents)
        watchdog.make_room(cfg.output)
        carry_model_files(cfg)
    engine = build_engine(cfg, model_config, mesh, place)
    blend = load_blend(cfg.data.blend)
    data = open_reader(blend, "train", cfg.data)
    if data.vocab_size > model_config.vocab_size:
        raise UserError(
            f"data.blend has token ids up to {data.vocab_size - 1}, the model knows {model_config.vocab_size}; prepare it with the model's tokenizer"
        )
    held_out = open_reader(blend, "validation", cfg.data) if cfg.validation else None
    if cfg.check_memory:
        engine.optimizer.check_memory(place)
    progress = _starting_point(cfg, engine, data, newest)
    log = MetricsLog(cfg.output, cfg.log, progress.step, cfg.steps, enabled=mesh.rank == 0, settings=cfg.model_dump(mode="json"))
    background = Background() if cfg.checkpoint.async_save else None
    run = Run(cfg, model_config, engine, data, held_out, parents, progress, log, Memory.of(progress.data), background=background)
    if mesh.rank == 0:
        bad_steps.forget_after(cfg.output, progress.step)
    _record(log, data, cfg.output, progress.samples, graphs=engine.graphs is not None)
    _introduce(run)
    return run


def _introduce(run: Run) -> None:
    """Say what runs, and on what, in a line each. Rank 0."""
    if not run.is_main:
        return
    cfg, data, engine, plan = run.cfg, run.data, run.engine, run.engine.mesh.plan
    run.log.say(f"{plan.describe()}; {cost.num_parameters(run.model_config):,} parameters; from step {run.progress.step} of {cfg.steps}")
    if isinstance(data, PackedReader):
        run.log.say(data.describe())
    if data.loss_line is not None:
        run.log.say(data.loss_line)
    changed = artifact.changed_versions(cfg.output) if run.progress.step else []
    if changed:
        run.log.say(f"other versions than at the last start, so no longer the same bits for certain: {', '.join(changed)}")
    if uses_transformer_engine(build_options(cfg), engine.device):
        run.log.say(engine.attention)
    if engine.graphs is not None:
        run.log.say(engine.graphs.describe(plan.dp))


def build_engine(cfg: TrainConfig, model_config: ModelConfig, mesh: Mesh, place: torch.device) -> Engine:
    """The model of a recipe with random weights, wrapped, and its optimizer: what `prism train` and `prism bench` both step."""
    if cfg.parallel.tp_comm_overlap:
        bf16_layers = cfg.fp8 is not None and bool(cfg.fp8.bf16_layers_at_start or cfg.fp8.bf16_layers_at_end)
        tp_overlap.start(mesh, place, cfg.data.seq_len, model_config.hidden_size, fp8=cfg.fp8 is not None, bf16_layers=bf16_layers)
    options = build_options(cfg)
    found = on_all(lambda rank: attention_obstacle(model_config, mesh, options, place))
    flash_attention.agreed(found)
    chunks = build(model_config, mesh, options, place)
    freeze(chunks, cfg.trainable)
    graphs = _graphs(cfg, chunks, place)
    with nullcontext() if graphs is None else graphs.beside():
        model = wrap_model(chunks, mesh, cfg.optimizer, overlap=place.type == "cuda" and graphs is None)
    optimizer = build_optimizer(model, cfg.optimizer, mesh, cfg.precision == "bf16")
    return Engine(model, optimizer, mesh, place, graphs, flash_attention.describe(found[0]))


def _graphs(cfg: TrainConfig, chunks: list[Chunk], place: torch.device) -> MicroBatchGraphs | None:
    if not cfg.cuda_graphs:
        return None
    if place.type != "cuda":
        raise UserError("cuda_graphs=true, and device=auto found no CUDA device here; set cuda_graphs=false")
    for chunk in chunks:
        draw_nothing(chunk)
    return MicroBatchGraphs(place)


def build_options(cfg: TrainConfig) -> BuildOptions:
    """What a recipe says of the model beyond its config and layout."""
    return BuildOptions(
        precision=cfg.precision,
        recompute=cfg.recompute,
        recompute_layers=cfg.recompute_layers,
        keep_attention=cfg.keep_attention,
        offload_activations=cfg.offload_activations,
        layers=cfg.layers,
        attention_backend=cfg.attention_backend,
        hidden_dropout=cfg.hidden_dropout,
        fp8=cfg.fp8,
        deterministic=cfg.deterministic,
        tp_comm_overlap=cfg.parallel.tp_comm_overlap,
        fuse_gradients=True,
    )


def _starting_point(cfg: TrainConfig, engine: Engine, data: SampleReader, newest: Path | None) -> Progress:
    """Load what there is to load, and say where the run stands. newest: the run's own checkpoint, compared with its checksums."""
    dist.barrier()
    if newest is not None:
        progress = checkpoint.load_all(engine, newest, checked=True)
    elif cfg.model.checkpoint is not None and cfg.model.load == "all":
        progress = checkpoint.load_all(engine, _start(cfg.model.checkpoint))
    else:
        if cfg.model.checkpoint is not None:
            checkpoint.load_weights(engine, _start(cfg.model.checkpoint))
        return Progress(data=data.fingerprint)
    progress.data = on_main(lambda: bad_steps.amended(cfg.output, progress.step, progress.data))
    data.follow(checkpoint.check_data(progress, data.fingerprint, cfg.data.on_change).records)
    return progress


def _start(path: Path) -> Path:
    """The checkpoint of another run, say, that a recipe names: rank 0's choice for all."""
    return on_main(lambda: run_folder.resolve(path))


def _record(log: MetricsLog, data: SampleReader, folder: Path, samples: int, graphs: bool) -> None:
    """Keep the plans of the data in the run's provenance, and say so where another one begins here; keep whether steps use CUDA graphs. Rank 0."""
    if not log.enabled:
        return
    records = recorded(data.fingerprint)
    artifact.annotate(folder, data_plans=records, cuda_graphs=graphs)
    if len(records) > 1 and records[-1]["first_sample"] == samples:
        log.say(f"another plan of the data from sample {samples} on: {'; '.join(records[-1]['changes'])}")


def carry_model_files(cfg: TrainConfig) -> None:
    """Keep the model's config and tokenizer in the run, for its checkpoints: what it started from may be gone when it goes on. Rank 0."""
    source, folder = recipe.model_files(cfg), cfg.output / HF_FILES
    if cfg.model.tokenizer is not None:
        checkpoint.gather_hf_files(source, cfg.model.tokenizer, folder)
    else:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    checkpoint.put_config(folder, recipe.trained_config(cfg)[0])


def _step(run: Run) -> StepReport:
    cfg, progress = run.cfg, run.progress
    begun, waited = time.perf_counter(), run.data.waited_seconds
    lr = cfg.optimizer.lr * factor(cfg.schedule, progress.step, cfg.steps)
    random_states = origin.get_random_states() if cfg.hidden_dropout else None  # a replay draws from them again
    report = train_step(run.engine, run.data, progress.samples, lr, cfg.optimizer.weight_decay, signal=int(run.wants_to_stop))
    progress.step += 1
    progress.samples += cfg.global_batch
    progress.tokens += cfg.global_batch * cfg.data.seq_len
    if not report.applied:
        with watchdog.long_phase("looking for the origin"):
            recovery.leave_out(run, report, random_states)
    run.recent.append((time.perf_counter() - begun, cfg.global_batch * cfg.data.seq_len, run.data.waited_seconds - waited))
    return report


def _log(run: Run, report: StepReport) -> None:
    slow, lines = stragglers.report(run.engine.clock, run.engine.mesh, run.cfg.straggler_percent)
    if not run.is_main:
        return
    cfg, progress = run.cfg, run.progress
    seconds, tokens, waited = (sum(column) for column in zip(*list(run.recent)[-cfg.log.interval :], strict=True))
    rate, steps = tokens / seconds, min(len(run.recent), cfg.log.interval)
    metrics: dict[str, Any] = {
        "loss": report.loss,
        "lr": cfg.optimizer.lr * factor(cfg.schedule, progress.step - 1, cfg.steps),
        "grad_norm": report.grad_norm,
        "tokens": progress.tokens,
        "loss_share": float(report.by_source[:, 1].sum()) / (cfg.global_batch * cfg.data.seq_len),
        "tokens_per_second": rate,
        "seconds_per_step": seconds / steps,
        "data_wait_seconds": waited / steps,
        "eta_seconds": (cfg.steps - progress.step) * cfg.global_batch * cfg.data.seq_len / rate,
        **_utilization(run, rate),
        **_by_source("loss", report.by_source, run.data.names),
        **slow,
    }
    run.log.step(progress.step, metrics, cfg.steps)
    for line in lines:
        run.log.say(line)


def _utilization(run: Run, tokens_per_second: float) -> dict[str, Any]:
    """TFLOP/s per rank and MFU, causal convention, recomputation not counted; MFU only where the device's bf16 peak is known."""
    flops = cost.flops_per_token(run.model_config, run.cfg.data.seq_len, causal=True) * tokens_per_second / run.engine.mesh.plan.world_size
    found: dict[str, Any] = {"tflops_per_rank": flops / 1e12}
    if run.engine.device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = cost.peak_tflops(torch.cuda.get_device_name())
        if peak is not None:
            found |= {"mfu": flops / 1e12 / peak, "mfu_convention": f"causal attention, no recompute, peak {peak:g} TFLOP/s"}
    return found


def _by_source(name: str, by_source: torch.Tensor, names: list[str]) -> dict[str, float]:
    rows = zip(names, by_source.tolist(), strict=True)
    return {f"{name}/{source}": total / count for source, (total, count) in rows if count}


def _validate(run: Run) -> None:
    assert run.held_out is not None and run.cfg.validation is not None
    total = torch.zeros(len(run.held_out.names), 2, dtype=torch.float64)
    for batch in range(run.cfg.validation.batches):
        total += evaluate_step(run.engine, run.held_out, batch * run.cfg.global_batch)
    loss, count = total.sum(dim=0).tolist()
    if not count:
        samples = run.cfg.validation.batches * run.cfg.global_batch
        raise UserError(
            f"none of the {samples} validation samples has a token that counts (data.loss={run.cfg.data.loss}); raise validation.batches, or drop "
            "[validation]"
        )
    metrics = {"validation/loss": loss / count, **_by_source("validation/loss", total, run.held_out.names)}
    shown = "  ".join(f"{name.removeprefix('validation/loss/')} {value:.4f}" for name, value in metrics.items() if name.count("/") > 1)
    run.log.event(run.progress.step, metrics, f"validation at step {run.progress.step}: loss {loss / count:.4f}  ({shown})")


def _save(run: Run) -> None:
    recovery.look_at_memory(run)
    records = recorded(run.data.fingerprint)
    run.progress.data = {**run.data.fingerprint, "history": records, **run.memory.record()}
    run.progress.consumed = consumption(records, run.progress.samples, run.cfg.data.seq_len)
    calendar.save(run, run.cfg)
