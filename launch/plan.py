"""A pipeline file read into steps: every recipe resolved and checked before anything runs.

    output = "runs/tiny"            # a stage without an output of its own writes to runs/tiny/NAME

    [[stage]]
    name = "prep"                   # names the stage in messages and references; also its kind, where `stage` is not given
    recipe = "prep.toml"            # relative to this file; what is in it wins over nothing, `set` wins over it

    [[stage]]
    name = "midtrain"
    stage = "train"
    recipe = "midtrain.toml"
    ranks = 2                       # processes of a local torchrun
    set = { data.blend = "stage:prep", train.steps = 300 }   # "stage:prep/tokenizer" is the output of stage prep, and a path in it

    [[stage]]
    name = "rl"
    recipe = "rl.toml"
    nodes = 4                       # for `prism launch`: 4 x 8 = 32 ranks
    gpus = 8                        # of each node
    hours = 30                      # wall-clock limit
    after = ["midtrain"]            # may begin when midtrain is done; without it, when the stage before it is

Owns: the schema, references between stages, the checks across stages. Refuses: a stage named twice, a reference to a later stage, two stages
with one output, ranks that the layout does not divide. Nothing is run here.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_prism import stages
from megatron_prism.config import Block, NonNegative, ParallelConfig, Positive, PositiveFloat, as_overrides, load_recipe, merge, read_toml, validate
from megatron_prism.errors import UserError
from megatron_prism.launch.job import Job

REFERENCE = "stage:"


class StageEntry(Block):
    """One stage of the chain."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """names the stage in messages and references, and its output folder"""
    stage: str | None = None
    """prep, convert, train, evaluate, or the dotted module of a stage of your own; the name, where it is not given"""
    recipe: Path | None = None
    """recipe file, relative to the pipeline file"""
    set: Annotated[dict[str, Any], Field(default_factory=dict)]
    """keys that win over the recipe's"""
    ranks: Positive | None = None
    """processes of all nodes together; only for stages that run on many ranks. With gpus: nodes * gpus"""
    nodes: Positive = 1
    """machines"""
    gpus: NonNegative | None = None
    """GPUs of each machine; training stages, and any stage on several machines, have one rank a GPU"""
    hours: PositiveFloat | None = None
    """wall-clock limit on a cluster; none: the partition's own"""
    after: list[str] | None = None
    """earlier stages that must be done before this one is started on a cluster; none: the one before it. Those that `set` refers to always are"""

    @property
    def kind(self) -> str:
        """The stage that this entry runs."""
        return self.stage or self.name


class PipelineConfig(Block):
    """A pipeline file."""

    output: Path | None = None
    """folder for the outputs of stages that name none themselves, relative to the current folder"""
    stage: Annotated[list[StageEntry], Field(min_length=1)]
    """the stages, in the order in which they run"""


@dataclass(frozen=True)
class Step:
    """One stage, ready to run. parallel: under torchrun; else in the worker process."""

    name: str
    module: stages.Stage
    job: Job
    config: Any
    parallel: bool
    after: tuple[str, ...] = ()
    """names of the stages that must be done before"""

    @property
    def output(self) -> Path:
        """The folder it makes."""
        return Path(self.config.output)

    @property
    def log(self) -> Path:
        """The file that its output is copied to: beside the folder, which holds nothing but the artifact."""
        return self.output.with_name(self.output.name + ".log")


def load_plan(path: Path) -> list[Step]:
    """Read a pipeline file. Errors: one UserError with everything that is wrong in it and in its recipes."""
    pipeline = validate(read_toml(path), PipelineConfig, where=str(path))
    problems = _clashes([entry.name for entry in pipeline.stage], "stage name")
    outputs: dict[str, Path] = {}
    plan: list[Step] = []
    for entry in pipeline.stage:
        try:
            step = _chained(entry, path.parent, pipeline, outputs)
        except UserError as error:
            problems += [f"stage {entry.name}: {line}" for line in str(error).splitlines()]
            # Later references to it are checked as if it were there, so that one fault is reported once.
            outputs[entry.name] = (pipeline.output or Path()) / entry.name
            continue
        outputs[entry.name] = step.output
        plan.append(step)
    problems += _clashes([str(step.output.absolute()) for step in plan], "output")
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return plan


def single(recipe: Path | None, overrides: list[str], entry: StageEntry) -> Step:
    """One stage without a pipeline: its recipe and overrides, and of `entry` the kind and the size. Errors: UserError."""
    return _step(entry, recipe, overrides, ())


def _chained(entry: StageEntry, folder: Path, pipeline: PipelineConfig, outputs: dict[str, Path]) -> Step:
    """A stage of a pipeline; outputs: those of the stages before it."""
    recipe = _short(folder / entry.recipe) if entry.recipe else None
    names = [later.name for later in pipeline.stage]
    table = merge(recipe, as_overrides(entry.set))
    found = _references(table)
    overrides = as_overrides(_with_outputs(entry.set, outputs, names))
    in_recipe = _references(merge(recipe, overrides))
    overrides += as_overrides({place: str(_resolve(text, outputs, names)) for place, text in in_recipe})
    if pipeline.output and "output" not in table and "output" in stages.load(entry.kind).Config.model_fields:
        overrides += as_overrides({"output": str(pipeline.output / entry.name)})
    read = [_named(text) for _, text in found]
    before = entry.after if entry.after is not None else list(outputs)[-1:]
    for name in before:
        _resolve(REFERENCE + name, outputs, names)
    return _step(entry, recipe, overrides, tuple(dict.fromkeys([*before, *read])))


def _step(entry: StageEntry, recipe: Path | None, overrides: list[str], after: tuple[str, ...]) -> Step:
    module = stages.load(entry.kind)
    config = load_recipe(recipe, overrides, module.Config)
    takes_ranks = entry.kind in stages.STAGES_FOR_RANKS or "." in entry.kind
    parallel = entry.kind in stages.PARALLEL_STAGES or (takes_ranks and (entry.ranks is not None or entry.nodes > 1))
    ranks = _ranks(entry, parallel)
    _check_layout(config, ranks)
    job = Job(entry.kind, recipe, tuple(overrides), ranks, entry.nodes, entry.gpus, entry.hours)
    return Step(entry.name, module, job, config, parallel, after)


def _ranks(entry: StageEntry, parallel: bool) -> int:
    """Processes of a stage: as many as it says, else one a GPU."""
    if not parallel:
        if entry.ranks:
            raise UserError(f"ranks={entry.ranks}: a {entry.kind} stage runs in one process; drop ranks")
        if entry.nodes > 1:
            raise UserError(f"nodes={entry.nodes}: a {entry.kind} stage runs in one process; drop nodes")
        return 1
    gpus = entry.nodes * (entry.gpus or 0)
    if entry.ranks and gpus and entry.ranks != gpus:
        raise UserError(f"ranks={entry.ranks} must be nodes*gpus = {entry.nodes}*{entry.gpus} = {gpus}: one rank a GPU; drop ranks")
    return entry.ranks or gpus or entry.nodes


def _references(value: Any, place: str = "") -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(place, value)] if value.startswith(REFERENCE) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _references(item, f"{place}.{key}" if place else str(key))]


def _with_outputs(value: Any, outputs: dict[str, Path], names: list[str]) -> Any:
    """A table with every `stage:NAME/inner` in it resolved."""
    if isinstance(value, dict):
        return {key: _with_outputs(item, outputs, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_outputs(item, outputs, names) for item in value]
    return str(_resolve(value, outputs, names)) if isinstance(value, str) and value.startswith(REFERENCE) else value


def _named(text: str) -> str:
    """The stage that a `stage:NAME/inner` text names."""
    return text.removeprefix(REFERENCE).partition("/")[0]


def _resolve(text: str, outputs: dict[str, Path], names: list[str]) -> Path:
    name, _, inner = text.removeprefix(REFERENCE).partition("/")
    if name in outputs:
        return outputs[name] / inner
    if name in names:
        raise UserError(f"{text!r} names a stage that does not come before this one; move stage {name} up")
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(f"{text!r} names no stage of this pipeline; " + (f"did you mean {REFERENCE}{near[0]}?" if near else f"it has {', '.join(names)}"))


def _check_layout(config: Any, ranks: int) -> None:
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is None:
        return
    if ranks % parallel.model_ranks:
        sizes = f"{parallel.tp}*{parallel.pp}*{parallel.cp} = {parallel.model_ranks}"
        raise UserError(f"ranks={ranks} must be a multiple of parallel.tp*pp*cp = {sizes}; try ranks={parallel.model_ranks}")
    batch, micro = getattr(config, "global_batch", None), getattr(config, "micro_batch", None)
    dp = ranks // parallel.model_ranks
    if isinstance(batch, int) and isinstance(micro, int) and batch % (dp * micro):
        fit = _fitting(batch // micro, parallel, ranks)
        raise UserError(f"global_batch={batch} must be a multiple of dp*micro_batch = {dp}*{micro}, for ranks={ranks}; try ranks={fit}")


def _fitting(micro_batches: int, parallel: ParallelConfig, ranks: int) -> int:
    """The most ranks, up to `ranks`, whose copies of the model share the micro-batches evenly."""
    copies = max(dp for dp in range(1, ranks // parallel.model_ranks + 1) if micro_batches % dp == 0)
    return copies * parallel.model_ranks


def _clashes(values: list[str], what: str) -> list[str]:
    twice = dict.fromkeys(value for value in values if values.count(value) > 1)
    return [f"two stages have the {what} {value}; give each its own" for value in twice]


def _short(path: Path) -> Path:
    """Without `a/../`, and relative to the current folder where it lies in it: this is what people read in logs."""
    full, here = path.resolve(), Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full
