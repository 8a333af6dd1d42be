"""The recipe of a CKA, and everything that can be said of it without reading a weight or a text. No torch.

Owns: which models are compared with which, on what, and the paper's figures beside. Refuses: models of unequal depth (layers are compared one by one;
widths and families may differ), other tokenizers unless asked for, inputs longer than a model's positions, too few inputs for the bootstrap.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism import families
from megatron_prism.config import Block, NonNegative, ParallelConfig, Positive
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.evals.reference import load_table
from megatron_prism.families.compare import tokenizer_difference
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan, make_plan

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
PAPER_TABLE = "T14"
SMALLEST_DRAW = 4
"""inputs; centred CKA of two is 1 whatever they are"""


class CkaModel(Block):
    """One model."""

    name: Name
    """what tables and pictures call it"""
    path: Path
    """checkpoint folder, training run (its newest complete checkpoint), or Hugging Face folder"""


class InputSet(Block):
    """Texts that the models read: from files, from tasks, or built in; one of the three."""

    name: Name
    """what tables and pictures call it; wikitext, c4 and gsm8k are those of the paper's Table 14"""
    files: Annotated[list[str], Field(default_factory=list)]
    """local files, folders or patterns: .txt (its paragraphs), .jsonl, .parquet; .jsonl and .txt may be .gz or .zst"""
    column: str = "text"
    """of .jsonl and .parquet: the column with the text (question, for GSM8K's files)"""
    tasks: Annotated[list[str], Field(default_factory=list)]
    """tasks and suites of the registry, whose prompts are read; see `data_dir`"""
    builtin: Literal["prose", "tasks"] | None = None
    """without files or network. prose: paragraphs of the Python language reference; tasks: prompts of reasoning-gym's tasks in the registry"""
    min_characters: Positive = 1
    """shorter texts, such as headings, are left out"""

    @model_validator(mode="after")
    def _has_one_origin(self) -> "InputSet":
        given = [name for name in ("files", "tasks", "builtin") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"{self.name} has {' and '.join(given) or 'none'} of files, tasks and builtin; give one of them")
        return self


class CkaPair(Block):
    """Two models to compare."""

    start: Name
    """name of a model"""
    end: Name
    """name of another"""
    paper: str | None = None
    """the row of the paper's Table 14 that this repeats (mid-trained against RL): granite-3.3-8b, llama-3.1-8b or nemotron-h-8b"""


class Bootstrap(Block):
    """How sure a figure is: it is taken again on a part of the inputs. The paper: 20 times 100 of 200."""

    draws: Annotated[int, Field(ge=2)] = 20
    """how often"""
    size: Annotated[int, Field(ge=SMALLEST_DRAW)] = 100
    """inputs of each draw, without an input twice: one that stands twice would make representations look more alike"""
    seed: NonNegative = 1234
    """of the draws, the same for all layers, pairs and sets"""


class Config(Block):
    """Centred kernel alignment of models, layer by layer."""

    output: Path
    """folder to write"""
    models: Annotated[list[CkaModel], Field(min_length=2)]
    """the models, in the order in which they came to be; all of one depth and with one tokenizer"""
    pairs: Annotated[list[CkaPair], Field(default_factory=list)]
    """what to compare; none given: each model with the one before it and with the first"""
    sets: Annotated[list[InputSet], Field(min_length=1)]
    """what the models read"""
    inputs: Positive = 200
    """texts of each set, drawn by `seed` from all of its own"""
    seed: NonNegative = 1234
    """of that draw"""
    max_tokens: Positive = 512
    """tokens of an input at most; a longer text is cut there"""
    data_dir: Path | None = None
    """folder with the tasks' data sets, for machines without network"""
    own_tokenizers: bool = False
    """let each model read through its own tokenizer where they differ; no text may be longer than max_tokens then, for they would be cut apart"""
    centred: bool = True
    """take the mean over inputs off, as CKA is defined; false: the uncentred form, as the paper's Eq. 4 is printed"""
    bootstrap: Bootstrap = Bootstrap()
    backend: Literal["engine", "transformers"] = "engine"
    """what computes the hidden states; transformers: in one process"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch sees a device, the CPU elsewhere"""
    precision: Literal["fp32", "bf16"] | None = None
    """of weights and activations; none: bf16 on CUDA, fp32 on the CPU"""
    parallel: ParallelConfig = ParallelConfig()
    """of the engine, under torchrun; tp, pp and sp"""
    batch_tokens: Positive = 16_384
    """tokens in one forward pass, padding included"""
    keep_states: bool = True
    """leave the mean hidden states in OUTPUT/states when done (inputs x layers x width x 4 bytes a model and set)"""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Config":
        for key, items in (("models", self.models), ("sets", self.sets)):
            listed: list[str] = [item.name for item in items]
            twice = next((name for place, name in enumerate(listed) if name in listed[:place]), None)
            if twice is not None:
                raise ValueError(f"{key}.name={twice} is given twice; give each a name of its own")
        names = [model.name for model in self.models]
        unknown = next((name for pair in self.pairs for name in (pair.start, pair.end) if name not in names), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is no model; models are {', '.join(names)}")
        same = next((pair.start for pair in self.pairs if pair.start == pair.end), None)
        if same is not None:
            raise ValueError(f"pairs: {same} with itself is 1; give two models")
        return self

    @model_validator(mode="after")
    def _draws_are_parts(self) -> "Config":
        if self.bootstrap.size >= self.inputs:
            raise ValueError(
                f"bootstrap.size={self.bootstrap.size} must be less than inputs={self.inputs}: a draw is a part of them; try inputs="
                f"{2 * self.bootstrap.size}, or bootstrap.size={max(SMALLEST_DRAW, self.inputs // 2)}"
            )
        return self

    @model_validator(mode="after")
    def _layout_is_one_that_can_be_looked_into(self) -> "Config":
        for key, off in (("cp", 1), ("vpp", None), ("tp_comm_overlap", False)):
            value = getattr(self.parallel, key)
            if value != off:
                raise ValueError(f"parallel.{key}={value}: hidden states are read under tp, pp and sp; leave parallel.{key} out")
        if self.backend == "transformers" and self.parallel != ParallelConfig():
            raise ValueError("backend=transformers computes in one process; leave parallel out, or use backend=engine")
        return self


class Compared(NamedTuple):
    """Two models, by their places in `Plan.models`."""

    label: str
    start: int
    end: int
    paper: str | None


class Plan(NamedTuple):
    """A checked recipe."""

    models: list[tuple[str, Path]]
    """name and folder"""
    shapes: list[ModelConfig]
    layouts: list[ParallelPlan]
    """of each model over the ranks"""
    pairs: list[Compared]


def check(cfg: Config, world_size: int | None = None) -> Plan:
    """Everything that can be said without reading weights or texts. world_size: None: the fewest ranks that the layout allows. Errors: UserError."""
    world_size = world_size or cfg.parallel.model_ranks
    if cfg.backend == "transformers" and world_size > 1:
        raise UserError(f"backend=transformers computes in one process, and {world_size} were started; start one, or use backend=engine")
    models = [(model.name, run_folder.find_weights(model.path, "models.path")) for model in cfg.models]
    shapes = [families.load(run_folder.hf_files(folder))[1] for _, folder in models]
    for model, (name, folder), shape in zip(cfg.models, models, shapes, strict=True):
        run_folder.check_apart(cfg.output, model.path, folder)
        if cfg.max_tokens > shape.max_position_embeddings:
            raise UserError(
                f"max_tokens={cfg.max_tokens} is more than model {name} has positions ({shape.max_position_embeddings}); "
                f"try max_tokens={shape.max_position_embeddings}"
            )
    _check_depth(models, shapes)
    if not cfg.own_tokenizers:
        _check_tokenizers(models)
    pairs = _pairs(cfg)
    _check_paper(cfg, pairs)
    rows = max(1, world_size // cfg.parallel.model_ranks)
    layouts = [make_plan(shape, cfg.parallel, world_size, seq_len=cfg.parallel.tp, global_batch=rows, micro_batch=1) for shape in shapes]
    return Plan(models, shapes, layouts, pairs)


def depth(shape: ModelConfig) -> int:
    """Layers as the Hugging Face model counts them."""
    return shape.num_layers // shape.layers_per_block


def paper(row: str | None, sets: Sequence[str]) -> dict[str, Any] | None:
    """The paper's least CKA over layers, of the sets that are its own."""
    if row is None:
        return None
    table = load_table(PAPER_TABLE)
    return {"row": row, "min": {name: table.value(row, name) for name in sets if name in table.columns}, "caveats": list(table.caveats)}


def _check_depth(models: Sequence[tuple[str, Path]], shapes: Sequence[ModelConfig]) -> None:
    for (name, _), shape in zip(models, shapes, strict=True):
        if depth(shape) != depth(shapes[0]):
            raise UserError(
                f"models {models[0][0]} and {name} have {depth(shapes[0])} and {depth(shape)} layers; layers are compared one by one, so give models "
                "of one depth (their widths may differ)"
            )


def _check_tokenizers(models: Sequence[tuple[str, Path]]) -> None:
    first, *others = ((name, run_folder.hf_files(folder)) for name, folder in models)
    for name, folder in others:
        difference = tokenizer_difference(first[1], folder)
        if difference is not None:
            raise UserError(
                f"models {first[0]} and {name} have different tokenizers: {difference}; give models that read text as the same ids, or set "
                "own_tokenizers=true: each then reads the same texts in its own way"
            )


def _pairs(cfg: Config) -> list[Compared]:
    names = [model.name for model in cfg.models]
    given = [(names.index(pair.start), names.index(pair.end), pair.paper) for pair in cfg.pairs]
    if not given:
        ends = range(1, len(names))
        given = [(start, end, None) for start, end in dict.fromkeys([*((end - 1, end) for end in ends), *((0, end) for end in ends)])]
    return [Compared(f"{names[start]} to {names[end]}", start, end, row) for start, end, row in given]


def _check_paper(cfg: Config, pairs: Sequence[Compared]) -> None:
    table, names = load_table(PAPER_TABLE), [entry.name for entry in cfg.sets]
    for row in (pair.paper for pair in pairs if pair.paper is not None):
        if row not in table.rows:
            raise UserError(f"pairs.paper={row} is no row of the paper's {PAPER_TABLE}; rows are {', '.join(table.rows)}")
        if not set(names) & set(table.columns):
            raise UserError(
                f"pairs.paper={row}: the paper's {PAPER_TABLE} is of sets {', '.join(table.columns)}, and sets are {', '.join(names)}; name one so, "
                "or leave paper out"
            )
