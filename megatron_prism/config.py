"""Recipes: TOML plus `key.sub=value` overrides, checked against a pydantic schema before torch is imported.

Owns: the strict base class of every config block, the blocks that several stages share, reading and resolving a recipe.
Refuses: unknown keys (with the nearest known one), wrong types, values out of range. All errors of a recipe are reported at once.
TOML has no null: the text `none`, in a recipe or an override, is None, which is off.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_prism.differences import shown
from megatron_prism.errors import UserError


class Block(BaseModel):
    """A frozen config block: unknown keys and wrong types are refused, off is None, docstrings are the help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    elsewhere: ClassVar[dict[str, str]] = {}
    """keys that belong to another stage's recipe, and what to say where one stands in this one"""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Schema = TypeVar("Schema", bound=BaseModel)
TIMEOUT_MINUTES = "PRISM_TIMEOUT_MINUTES"
"""Environment variable: how long the ranks of a process group wait for each other, where the stage says nothing of its own."""
SAVE_SECONDS = "PRISM_SAVE_SECONDS"
"""Environment variable: how long after the word to stop a run is ended by whoever started it, saved or not."""
RESOLVED = "resolved"
"""The validation context of a config that says all that other files said when it was made."""


CommType = Literal["p2p", "a2a", "all_gather", "a2a+p2p"]


class ParallelConfig(Block):
    """How one model is cut over ranks. Data parallelism is never set: dp = world size / (tp * pp * cp)."""

    tp: Positive = 1
    """tensor parallel: every layer's matrices are cut over this many ranks"""
    pp: Positive = 1
    """pipeline parallel: the layers are cut into this many stages"""
    vpp: Annotated[int, Field(ge=2)] | None = None
    """virtual pipeline: chunks of layers that each pipeline rank holds (interleaved 1F1B)"""
    cp: Positive = 1
    """context parallel: every sequence is cut over this many ranks"""
    cp_comm_type: CommType | None = None
    """the exchange of TransformerEngine's attention under cp; none: p2p, with a sliding window a2a where heads allow (docs/long_context.md)"""
    hierarchical_context_parallel_sizes: tuple[Positive, Positive] | None = None
    """with a2a+p2p: ranks of each group, and groups"""
    sp: bool = False
    """sequence parallel: norms and dropout also cut the sequence over the tensor-parallel ranks"""
    tp_comm_overlap: bool = False
    """with tp and sp, on CUDA: the exchange of tokens runs beside the matrix products (TransformerEngine's userbuffers)"""
    num_layers_in_first_pipeline_stage: Positive | None = None
    """layers of the first stage, where pp does not divide them; the stages without such a number share the rest evenly"""
    num_layers_in_last_pipeline_stage: Positive | None = None
    """layers of the last stage; fewer there make room for the LM head"""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model: tp * pp * cp."""
        return self.tp * self.pp * self.cp


class OptimizerConfig(Block):
    """AdamW. Defaults: PRISM's mid-training (Table 16); it does not state clipping, 1.0 is the default of IBM's trainer."""

    lr: PositiveFloat = 5e-5
    """peak learning rate"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """decay of the two moments"""
    eps: PositiveFloat = 1e-10
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled; not on norms and biases"""
    clip_grad: PositiveFloat | None = 1.0
    """largest global gradient norm; none: no clipping"""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """type in which gradients are summed over micro-batches and ranks, 4 or 2 bytes a parameter"""
    moments: Literal["fp32", "bf16"] = "fp32"
    """type in which both moments are kept, 8 or 4 bytes a parameter over the data-parallel ranks"""
    split_master: bool = False
    """keep of each fp32 master weight only the 16 bits that its bf16 weight lacks, 2 bytes instead of 4, the same values"""

    @property
    def has_small_types(self) -> bool:
        """Whether gradients, moments or master weights take less than fp32."""
        return self.gradients == "bf16" or self.moments == "bf16" or self.split_master

    @property
    def state_bytes(self) -> int:
        """Bytes of master weight and moments of one parameter of a bf16 model."""
        return (2 if self.split_master else 4) + (4 if self.moments == "bf16" else 8)

    @model_validator(mode="after")
    def _bf16_moments_can_move(self) -> "OptimizerConfig":
        if self.moments == "bf16" and 1 - self.betas[1] < 2**-8:
            raise ValueError(
                f"moments=bf16 with betas[1]={self.betas[1]:g}: a step's share {1 - self.betas[1]:.2g} of the second moment is lost in bf16's "
                "rounding (2^-8); lower betas[1] to 0.996 or less, or use moments=fp32"
            )
        return self


class Fp8Config(Block):
    """Matrix products of the layers' linear projections in FP8, the rest in bf16: embedding, LM head, norms, attention, Mamba's convolution and scan.

    Hopper and newer, with TransformerEngine. Weights, gradients and optimizer states stay as without it, unless `params`.
    """

    recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    """where scales come from. delayed: maxima of earlier steps; tensorwise: the tensor itself; blockwise: blocks of 128 x 128 (weights) or 1 x 128"""
    format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: e4m3 forward, e5m2 for gradients; none: hybrid, but e4m3 for blockwise, whose small blocks need no wide range"""
    bf16_layers_at_start: NonNegative = 0
    """first layers kept in bf16 (megatron-core's layers: a hybrid's mixers and MLPs count one each)"""
    bf16_layers_at_end: NonNegative = 0
    """last layers kept in bf16"""
    amax_history_len: Positive = 1024
    """steps that delayed scaling looks back"""
    params: bool = False
    """keep the layers' weights in FP8 alone, with whole fp32 masters, and gather them so, 1 byte instead of 2 (recipe=tensorwise)"""

    @property
    def formats(self) -> str:
        """The format in effect."""
        return self.format or ("e4m3" if self.recipe == "blockwise" else "hybrid")

    @model_validator(mode="after")
    def _recipe_can_do_it(self) -> "Fp8Config":
        if self.recipe == "delayed" and (self.bf16_layers_at_start or self.bf16_layers_at_end):
            raise ValueError(
                "recipe=delayed scales all layers at once and cannot leave some in bf16 (bf16_layers_at_start, bf16_layers_at_end); "
                "use recipe=tensorwise or blockwise"
            )
        if self.params and self.recipe != "tensorwise":
            raise ValueError(f"params=true with recipe={self.recipe}: only tensorwise scales of weights are made of masters; use recipe=tensorwise")
        return self


def load_recipe(path: Path | None, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read a TOML recipe (None: overrides alone), apply `key.sub=value` overrides, check it against `schema`.

    Errors: UserError listing every unknown key, missing key and wrong value.
    """
    return validate(merge(path, overrides), schema, where=str(path) if path else "command line")


def merge(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The tables of a recipe (None: empty) after its `key.sub=value` overrides, not yet checked against a schema."""
    data: dict[str, Any] = {} if path is None else _off(read_toml(path))
    for override in overrides:
        _apply_override(data, override)
    return data


def as_overrides(table: dict[str, Any], prefix: str = "") -> list[str]:
    """The `key.sub=value` texts that set these tables: `merge(None, as_overrides(t))` gives t back (empty tables are left out)."""
    found: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += as_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_literal(value)}")
    return found


def _literal(value: Any) -> str:
    """A value as TOML on one line (tomli_w would write long tables of a list as sections of their own)."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").removesuffix("\n")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Errors: UserError for a missing or malformed file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a TOML recipe") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a TOML recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def validate(data: dict[str, Any], schema: type[Schema], where: str, context: Any = None) -> Schema:
    """Check plain tables against a schema, strictly (JSON types: an int is no string, a list may be a tuple). context: for its validators."""
    try:
        return schema.model_validate_json(json.dumps(data, default=str), strict=True, context=context)
    except ValidationError as error:
        lines = [_describe(problem, schema) for problem in error.errors(include_url=False)]
        raise UserError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def resolved(tables: dict[str, Any], schema: type[Schema], where: str) -> Schema:
    """A config that `to_toml` wrote, with the defaults of today's schema where it lacks a key. Touches no file, nor any that a recipe may name.

    Errors: UserError as for `load_recipe`; so it says something of the tables, never of a disk.
    """
    return validate(_off(tables), schema, where=where, context=RESOLVED)


def to_toml(config: BaseModel) -> str:
    """The resolved config as TOML, which `load_recipe` reads back as an equal config.

    A key that is off (None) is left out where off is its default, and written as the text `none` where it is not.
    """
    return tomli_w.dumps(_spelled_out(config))


def config_hash(config: BaseModel) -> str:
    """sha256 of the resolved config: two runs with one hash were asked for the same thing."""
    text = json.dumps(json.loads(config.model_dump_json()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _spelled_out(config: BaseModel) -> dict[str, Any]:
    """The JSON form of a config without its default Nones."""
    table: dict[str, Any] = {}
    plain = json.loads(config.model_dump_json())
    for name, field in type(config).model_fields.items():
        if field.exclude:  # a matter of the machine, not of the result
            continue
        value = getattr(config, name)
        if value is None:
            if field.is_required() or field.get_default(call_default_factory=False) is not None:
                table[name] = "none"
        elif isinstance(value, BaseModel):
            table[name] = _spelled_out(value)
        elif isinstance(value, (list, tuple)):
            table[name] = [_spelled_out(item) if isinstance(item, BaseModel) else plain[name][i] for i, item in enumerate(value)]
        elif isinstance(value, dict):
            table[name] = {key: _spelled_out(item) if isinstance(item, BaseModel) else plain[name][key] for key, item in value.items()}
        else:
            table[name] = plain[name]
    return table


def _off(value: Any) -> Any:
    """The tables of a recipe with the text `none` as None."""
    if isinstance(value, dict):
        return {key: _off(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_off(item) for item in value]
    return None if value == "none" else value


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must read key=value or block.key=value, as in parallel.tp=2")
    *parents, leaf = key.strip().split(".")
    place: Any = data
    for parent in parents:
        place = _step_into(place, parent, override)
    if isinstance(place, list):
        place[_list_index(place, leaf, override)] = _parse_value(text)
    elif isinstance(place, dict):
        place[leaf] = _parse_value(text)
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} is a value, not a block")


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_list_index(place, key, override)]
    if isinstance(place, dict):
        return place.setdefault(key, {})
    raise UserError(f"override {override!r}: there is no block {key!r} to go into")


def _list_index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"override {override!r}: {key!r} must be an index from 0 to {len(items) - 1}")
    return int(key)


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (2, 1e-4, true, [1, 2], "x"), else the text itself; `none` is off."""
    if text.strip().lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _describe(problem: Any, schema: type[BaseModel]) -> str:
    """One line for one pydantic error: the key as one would write it, the rule, the value, and the way out."""
    place = ".".join(str(part) for part in problem["loc"] if "[" not in str(part)) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place}; {_nearest(place, schema)}"
    field = _field(place, schema)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    if problem["type"] == "missing":
        return f"{place} is missing; it has no default{meaning}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{place}: {message}" if problem["loc"] else message
    return f"{place}={shown(problem['input'])}: {message[:1].lower()}{message[1:]}{meaning}"


def _nearest(place: str, schema: type[BaseModel]) -> str:
    """What may have been meant: a key of the same block, then the same key in another block, else the keys of this block."""
    other_stage = getattr(schema, "elsewhere", {}).get(place)
    if other_stage is not None:
        return str(other_stage)
    parent, _, leaf = place.rpartition(".")
    siblings = _siblings(place, schema)
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    elsewhere = [key for key in _known_keys(schema) if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(siblings)}"


def _field(place: str, schema: type[BaseModel]) -> Any:
    """The pydantic field at a dotted place (list indices are passed over); None where the schema has none."""
    blocks, field = [schema], None
    for part in (part for part in place.split(".") if not part.isdigit()):
        field = next((block.model_fields[part] for block in blocks if part in block.model_fields), None)
        if field is None:
            return None
        blocks = blocks_in(field.annotation)
    return field


def blocks_in(annotation: Any) -> list[type[BaseModel]]:
    """The config blocks inside a type: of `list[Source] | None`, Source."""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__") and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in getattr(annotation, "__args__", ()) for block in blocks_in(part)]


def _known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for block in blocks_in(field.annotation):
            keys += _known_keys(block, f"{prefix}{name}.")
    return keys


def _siblings(place: str, schema: type[BaseModel]) -> list[str]:
    parents = [part for part in place.split(".")[:-1] if not part.isdigit()]
    prefix = ".".join(parents) + "." if parents else ""
    names = [key.removeprefix(prefix) for key in _known_keys(schema) if key.startswith(prefix)]
    return sorted({name for name in names if "." not in name}) or ["nothing"]
