"""Plan: what a model costs, or what a recipe or a pipeline would need and take, before anything is downloaded or started.

prism plan MODEL [--gpus 8 --memory 80 --seq-len 8192]     a published name, or a folder with a config.json
prism plan RECIPE.toml [key.sub=value ...] [--model MODEL --gpus 64 --memory 141 --price-per-gpu-hour 3]
prism plan PIPELINE.toml [--memory 80]                     its training stages, each on the GPUs that it names

Not a stage of a pipeline: it writes nothing. The figures and tables of layouts are `planning`'s. No torch, so the answer is instant.
Refuses: names that are neither, with the near ones; GPUs without rates; memory in which nothing fits.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prism import families
from megatron_prism.config import ParallelConfig, as_overrides, merge, read_toml, validate
from megatron_prism.engine import data_plan, recipe, run_folder
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import choices, cost, layout, layouts_text, parameters, rates
from megatron_prism.planning.layouts_text import View
from megatron_prism.planning.step_time import NETWORK_GBPS, Machine
from megatron_prism.stages import extend

DEFAULTS = cost.Training()
BYTES_PER_PARAMETER = {"weights": DEFAULTS.value_bytes, "gradients": DEFAULTS.gradient_bytes, "optimizer": DEFAULTS.state_bytes}
"""of a bf16 run with a recipe's defaults"""
SMALL_GIB = 100
"""a GPU of less is taken for an H100, of more for an H200, where none is named"""
TRAINING_STAGES = ("train", "extend")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the target."""

    model: str | None = None
    gpus: int | None = None
    memory_gib: float | None = None
    seq_len: int | None = None
    gpu: str | None = None
    tflops: float | None = None
    network_gbps: float = NETWORK_GBPS
    price: float | None = None
    tokens: int | None = None
    everything: bool = False

    @property
    def machine(self) -> Machine:
        """Rates and network. Errors: UserError for a GPU without rates."""
        known = "h100" if self.memory_gib is not None and self.memory_gib < SMALL_GIB else "h200"
        return Machine(rates.find(self.gpu or known, self.tflops), self.network_gbps)


def run(target: str, overrides: Sequence[str], options: Options) -> None:
    """Print the plan of a model, a recipe or a pipeline. Errors: UserError, also where nothing fits."""
    _ = options.machine  # a GPU without rates is refused before anything is printed
    if target.endswith(".toml"):
        path = Path(target)
        is_pipeline = isinstance(read_toml(path).get("stage"), list)
        print(describe_pipeline(path, overrides, options) if is_pipeline else _fold(describe_recipe(path, overrides, options)))
        if options.gpus is not None and not is_pipeline:
            _print_recipe_layouts(path, overrides, options)
        return
    if overrides or options.model is not None:
        raise UserError(f"{' '.join(overrides) or '--model'} goes with a recipe; {target!r} is a model: prism plan MODEL [--gpus N] [--memory GiB]")
    if options.memory_gib is not None and options.gpus is None:
        raise UserError("--memory says how large a GPU is; say how many there are with --gpus")
    shape, length = find_model(target), options.seq_len or 8192
    _print_model(target, shape, length)
    if options.gpus is not None:
        task = choices.Task(shape, options.gpus, length, machine=options.machine)
        _print_layouts(View(task, options.memory_gib, options.tokens, options.price), None, options.everything)


def find_model(target: str) -> ModelConfig:
    """The shape of a published name, a Hugging Face folder or config.json, or one of our checkpoints and runs. Errors: UserError with near names."""
    path = Path(target)
    if target in families.PUBLISHED:
        config = families.published(target)
        return families.find(config).model_config(config)
    if path.name == "config.json" and path.is_file():
        return families.load(path.parent)[1]
    if (path / "config.json").is_file():
        return families.load(path)[1]
    if (path / "hf").is_dir() or (path / "checkpoints").is_dir() or (path / "provenance.json").is_file():
        return families.load(run_folder.resolve(path) / "hf")[1]
    near = difflib.get_close_matches(target.lower(), families.PUBLISHED, n=2, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"published models: {', '.join(families.PUBLISHED)}"
    raise UserError(
        f"{target!r} is neither a recipe (.toml), nor a folder with a config.json, nor one of our checkpoints or runs, nor a published model; {known}"
    )


def describe_recipe(path: Path, overrides: Sequence[str], options: Options) -> str:
    """The dry run of a training recipe, and whether it fits; the model's checkpoint and the data need not exist yet when `model` names the shape.

    A layout that these GPUs do not allow is no error where others are asked for (gpus and memory): the text says so.
    """
    read = _read_recipe(path, overrides, options)
    cfg, shape = read.cfg, read.shape
    try:
        plan = read.plan(options.gpus)
    except UserError as error:
        if options.gpus is None or options.memory_gib is None:
            raise
        return f"layout       not allowed: {error}"
    text = cost.describe_run(shape, plan, cfg.steps, cfg.global_batch, cfg.data.seq_len, cfg.training)
    if cfg.data.blend.exists():
        text += f"\n{_data(cfg)}"
    if options.memory_gib is None:
        return text
    return f"{text}\nmemory       {choices.verdict(cost.memory(shape, plan, cfg.data.seq_len, cfg.training), options.memory_gib)}"


def _data(cfg: recipe.TrainConfig) -> str:
    """The table of the run's sources, or why there is none yet: a plan may come before the data."""
    try:
        return data_plan.describe(cfg)
    except UserError as error:
        return f"data         {error}"


@dataclass(frozen=True)
class _Recipe:
    """What a recipe says, and the shape of its model."""

    table: dict[str, Any]
    cfg: recipe.TrainConfig
    shape: ModelConfig

    def plan(self, gpus: int | None) -> layout.ParallelPlan:
        """Its layout on so many GPUs (else WORLD_SIZE, else the fewest). Errors: UserError."""
        cfg = self.cfg
        world_size = gpus or int(os.environ.get("WORLD_SIZE", cfg.parallel.model_ranks))
        plan = layout.make_plan(self.shape, cfg.parallel, world_size, cfg.data.seq_len, cfg.global_batch, cfg.micro_batch)
        recipe.check_model(cfg, self.shape, plan)
        return plan

    def check(self, plan: layout.ParallelPlan, parallel: ParallelConfig, training: cost.Training) -> None:
        """Whether the recipe goes with another layout and recomputation. Errors: UserError, as `prism train` would say it."""
        changed = {"parallel": parallel.model_dump(), "recompute": training.recompute, "keep_attention": training.keep_attention}
        table = {**self.table, **changed, "recompute_layers": None, "offload_activations": training.offload_activations}
        recipe.check_model(validate(table, type(self.cfg), where="with the recipe's other keys"), self.shape, plan)

    def task(self, gpus: int, machine: Machine) -> choices.Task:
        """What is to be laid out."""
        cfg = self.cfg
        return choices.Task(
            self.shape,
            gpus,
            cfg.data.seq_len,
            cfg.global_batch,
            micro_batch=cfg.micro_batch,
            training=cfg.training,
            machine=machine,
            check=self.check,
            undone={key: off for key, (value, off) in self._of_its_layout().items() if value},
        )

    def _of_its_layout(self) -> dict[str, tuple[Any, str]]:
        """Keys that belong to one layout and may forbid another: their values, and what turns them off."""
        cfg, kept = self.cfg, ("tp", "pp", "cp", "sp")
        of_layout = {f"parallel.{name}": getattr(cfg.parallel, name) for name in type(cfg.parallel).model_fields if name not in kept}
        found = of_layout | {name: getattr(cfg, name) for name in ("recompute_layers", "keep_attention", "offload_activations")}
        return {key: (value, "false" if isinstance(value, bool) else "none") for key, value in found.items()}

    def own(self, task: choices.Task) -> choices.Choice | None:
        """Its own layout; None where it is not allowed."""
        try:
            plan = self.plan(task.gpus)
        except UserError:
            return None
        return task.choice(plan, self.cfg.training, self.cfg.parallel.tp_comm_overlap)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.cfg.steps * self.cfg.global_batch * self.cfg.data.seq_len


def _read_recipe(path: Path, overrides: Sequence[str], options: Options) -> _Recipe:
    """Errors: UserError."""
    table = merge(path, [*overrides, *([f"data.seq_len={options.seq_len}"] if options.seq_len else [])])
    _fill_paths(table, options.model, path)
    cfg = validate(table, extend.Config if recipe.EXTENSION_KEYS.keys() & table.keys() else recipe.TrainConfig, where=str(path))
    shape = find_model(options.model) if options.model is not None else _recipe_model(cfg)
    return _Recipe(table, cfg, extend.planned(shape, cfg) if isinstance(cfg, extend.Config) else shape)


def plan_recipe(
    path: Path, overrides: Sequence[str], model: str | None = None, gpus: int | None = None, seq_len: int | None = None
) -> tuple[recipe.TrainConfig, ModelConfig, layout.ParallelPlan]:
    """A training recipe, the shape of its model and its plan on so many GPUs (else WORLD_SIZE, else the fewest). Errors: UserError."""
    read = _read_recipe(path, overrides, Options(model=model, seq_len=seq_len))
    return read.cfg, read.shape, read.plan(gpus)


def _fill_paths(table: dict[str, Any], model: str | None, path: Path) -> None:
    """Paths that a recipe leaves to its pipeline, and a plan does not read. Errors: UserError where that leaves no model."""
    table.setdefault("output", "unset")
    if isinstance(data := table.setdefault("data", {}), dict):
        data.setdefault("blend", "unset")
    if not table.get("model"):
        if model is None:
            raise UserError(f"{path} leaves its model to a pipeline; name it with --model, one of {', '.join(families.PUBLISHED)}")
        table["model"] = {"checkpoint": "unset"}
    elif isinstance(table["model"], dict) and table["model"].get("hf_config"):
        table["model"].setdefault("tokenizer", "unset")


def _recipe_model(cfg: recipe.TrainConfig) -> ModelConfig:
    start = cfg.model.checkpoint or cfg.model.hf_config
    assert start is not None
    if not start.exists():
        raise UserError(
            f"the recipe starts from {start}, which does not exist yet; name the model with --model, one of {', '.join(families.PUBLISHED)}"
        )
    return families.load(recipe.model_files(cfg))[1]


def _print_model(name: str, model: ModelConfig, seq_len: int) -> None:
    from rich.console import Console
    from rich.table import Table

    total = cost.num_parameters(model)
    print(f"{name}: {_layers(model)}")
    table = Table()
    for heading in ("part", "parameters", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, count in cost.parameters_by_part(model).items():
        table.add_row(part, f"{count:,}" if count else "tied", f"{count / total:.1%}" if count else "")
    table.add_section()
    table.add_row("all", f"{total:,}", "")
    console = Console(highlight=False)
    console.print(table)
    if model.hybrid_layer_pattern:
        print(f"pattern  {model.hybrid_layer_pattern}")
    causal, full = (cost.flops_per_token(model, seq_len, causal) / 1e9 for causal in (True, False))
    flops = f"FLOPs    {causal:.2f}e9 a token at {seq_len:,} tokens with causal attention, {full:.2f}e9 with full; forward and backward"
    sizes = ", ".join(f"{kind} {cost.readable_bytes(size * total)}" for kind, size in BYTES_PER_PARAMETER.items())
    print(layouts_text.fold(f"{flops}\nbytes    {sizes} (bf16 training, before any cut)"))
    if note := cost.length_note(model, seq_len):
        print(f"note     {note}")


def _layers(model: ModelConfig) -> str:
    counts = parameters.layer_counts(model)
    if model.is_hybrid:
        return f"{model.num_layers} layers, " + ", ".join(f"{counts[symbol]} {name}" for symbol, name in parameters.NAMES.items() if counts[symbol])
    window = f", sliding window of {model.sliding_window:,}" if model.sliding_window else ""
    return f"{model.num_layers} layers of attention and MLP{window}"


def _print_recipe_layouts(path: Path, overrides: Sequence[str], options: Options) -> None:
    assert options.gpus is not None
    read = _read_recipe(path, overrides, options)
    if read.cfg.precision != "bf16":
        print(f"time         none: there are no rates for precision={read.cfg.precision}")
        return
    task = read.task(options.gpus, options.machine)
    view = View(task, options.memory_gib, options.tokens or read.tokens, options.price)
    own = read.own(task)
    if options.memory_gib is not None:
        _print_layouts(view, own, options.everything)
    elif own is not None:
        print(f"\n{layouts_text.heading(view)}\n\n{layouts_text.table(view, [('own', own)])}\n\n{layouts_text.breakdown(view, own)}")
        print(f"{layouts_text.costs(view, own)}\n{layouts_text.convention(view)}\nwith --memory GiB, other layouts too, and which of them fit")


def _print_layouts(view: View, own: choices.Choice | None, everything: bool) -> None:
    """The best few, the one to take, where its time goes, and why not the others. Errors: UserError where none fits."""
    found = choices.survey(view.task)
    best = choices.recommended(found.allowed, view.memory_gib or float("inf"))
    if best is None and found.allowed:
        best = choices.recommended(choices.offloaded(view.task, found), view.memory_gib or float("inf"))
    print(f"\n{layouts_text.heading(view)}\n")
    if best is None:
        if own is not None:
            print(layouts_text.table(view, [("own", own)]) + "\n")
        if found.allowed:
            print(layouts_text.why_not(view, found, None, everything) + "\n")
        raise UserError(layouts_text.nothing_fits(view, found))
    parts = [
        layouts_text.best_few(view, found, best, own),
        layouts_text.taken(view, best, found, own),
        layouts_text.breakdown(view, best),
        layouts_text.why_not(view, found, best, everything),
        layouts_text.legend(view),
    ]
    print("\n\n".join(part for part in parts if part))


def describe_pipeline(path: Path, overrides: Sequence[str], options: Options) -> str:
    """Layout, memory and time of each training stage, on its own GPUs or on those asked for. Errors: UserError."""
    if overrides:
        raise UserError(f"{' '.join(overrides)}: a pipeline's keys stand in its stages; plan one stage's recipe to try others")
    if options.tokens is not None:
        raise UserError("--tokens: each stage of a pipeline has its recipe's; plan one stage's recipe to try others")
    entries = [entry for entry in read_toml(path)["stage"] if isinstance(entry, dict)]
    model = options.model or _pipeline_model(entries)
    stages: list[layouts_text.Stage] = []
    others: list[str] = []
    for entry in entries:
        found = _stage(path.parent, entry, replace(options, model=model)) if entry.get("stage", entry.get("name")) in TRAINING_STAGES else None
        if found is None:
            others.append(str(entry.get("name")))
        else:
            stages.append(found)
    if not stages:
        raise UserError(f"{path} has no training stage in bf16 or FP8 with a recipe: there is nothing to plan")
    return layouts_text.pipeline(stages, others)


def _stage(folder: Path, entry: dict[str, Any], options: Options) -> layouts_text.Stage | None:
    """A training stage on its GPUs, or on those asked for; None without a recipe or without rates. Errors: UserError that names it."""
    if "recipe" not in entry:
        return None
    gpus = options.gpus or entry.get("ranks") or entry.get("nodes", 1) * entry.get("gpus", 1)
    try:
        read = _read_recipe(folder / entry["recipe"], as_overrides(entry.get("set", {})), options)
        if read.cfg.precision != "bf16":
            return None
        task = read.task(gpus, options.machine)
        choice = task.choice(read.plan(gpus), read.cfg.training, read.cfg.parallel.tp_comm_overlap)
    except UserError as error:
        raise UserError(f"stage {entry.get('name')} on {gpus} GPUs: {error}") from None
    view = View(task, options.memory_gib, read.tokens, options.price)
    return layouts_text.Stage(str(entry.get("name")), view, choice, entry.get("hours"))


def _pipeline_model(entries: list[dict[str, Any]]) -> str | None:
    """The published model that the first stages import, by its folder's name; None: the recipes must know."""
    sources = [Path(str(entry.get("set", {}).get("source", ""))).name.lower() for entry in entries]
    return next((source for source in sources if source in families.PUBLISHED), None)


def _fold(text: str) -> str:
    """A dry run in 80 columns; its tables stay as they are."""
    return layouts_text.fold(text, " " * 13)
