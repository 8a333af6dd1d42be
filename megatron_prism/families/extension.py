"""A model for longer sequences: what changes of its config.json, and which changes its checkpoint forbids. No torch.

Owns: `RopeChange`, the recipe's block; `extended`, from one config.json to the next, in the keys that transformers 4.57 and 5 and vLLM read.
Refuses, with rule, values and fix: changes of rotary embeddings that the model does not have, that stack on a scaling which the checkpoint has
already, that do not reach the length asked for, or that a sliding window makes pointless; lengths below the present one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, Positive, PositiveFloat
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig

Kind = Literal["unchanged", "theta", "ntk", "linear", "yarn", "llama3"]
WITH_FACTOR = ("ntk", "linear", "yarn", "llama3")
REACHING = ("ntk", "linear", "yarn")
"""kinds whose factor is the ratio of the two lengths. Not llama3: LLaMA 3.1's is 8 for 8,192 to 131,072"""
OPTIONS: dict[str, tuple[str, ...]] = {
    "theta": ("theta",),
    "factor": WITH_FACTOR,
    "original_max_position_embeddings": WITH_FACTOR,
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn",),
}
"""option -> the kinds that have it"""
SHAPES: dict[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
}
"""kind -> what of a scaling a larger factor leaves as the checkpoint has it, where the recipe does not say it"""


DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_slow": 1.0, "beta_fast": 32.0}
"""what neither recipe nor checkpoint says: LLaMA 3.1's, and those of YaRN's authors"""


class RopeChange(Block):
    """What becomes of the rotary embeddings. `factor` is new length / original length where it is not given."""

    kind: Kind = "unchanged"
    """unchanged (PRISM: Granite's base is 1e7 already); theta: another base; ntk: the base times factor ^ (d / (d - 2)); linear: positions divided by
    the factor; yarn, llama3: long waves stretched by it, short ones kept (arXiv 2309.00071; LLaMA 3.1)"""
    theta: PositiveFloat | None = None
    """kind=theta: the new base"""
    factor: Annotated[float, Field(gt=1)] | None = None
    """ntk, linear, yarn, llama3: how many times longer; none: largest new length / original length"""
    original_max_position_embeddings: Positive | None = None
    """the length that the model was trained with before; none: as the checkpoint's config says"""
    low_freq_factor: PositiveFloat | None = None
    """llama3: waves longer than original length / this are stretched whole; none: as the checkpoint has it, else 1"""
    high_freq_factor: PositiveFloat | None = None
    """llama3: waves shorter than original length / this are kept; none: as the checkpoint has it, else 4"""
    beta_fast: PositiveFloat | None = None
    """yarn: waves that turn this often in the original length, or more, are kept; none: as the checkpoint has it, else 32"""
    beta_slow: PositiveFloat | None = None
    """yarn: waves that turn this often or less are stretched whole; none: as the checkpoint has it, else 1"""
    attention_factor: PositiveFloat | None = None
    """yarn: factor of queries and of keys; none: 0.1 ln(factor) + 1"""

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> "RopeChange":
        for name in sorted(OPTIONS):
            if getattr(self, name) is not None and self.kind not in OPTIONS[name]:
                raise ValueError(f"rope.{name} belongs to rope.kind={' or '.join(OPTIONS[name])}, not {self.kind}; drop it, or change the kind")
        if self.kind == "theta" and self.theta is None:
            raise ValueError("rope.kind=theta needs rope.theta, the new base")
        low, high, slow, fast = (getattr(self, name) or value for name, value in DEFAULTS.items())
        if low >= high or slow >= fast:
            raise ValueError("rope.low_freq_factor must be below rope.high_freq_factor, and rope.beta_slow below rope.beta_fast; swap them")
        return self


@dataclass(frozen=True)
class Extension:
    """A change of lengths as a recipe asks for it."""

    seq_len: int
    max_position_embeddings: int | None = None
    rope: RopeChange = field(default_factory=RopeChange)
    sliding_window: Literal["keep", "remove"] | None = None


def extended(config: Mapping[str, Any], model: ModelConfig, asked: Extension) -> dict[str, Any]:
    """The config.json of the extended model. config, model: the checkpoint's. Equal to `config` where nothing changes. Errors: UserError."""
    length = _length(model, asked)
    changed = dict(config)
    if length != model.max_position_embeddings:
        changed["max_position_embeddings"] = length
    _check_window(model, asked, length)
    if asked.sliding_window == "remove":
        changed["sliding_window"] = None
    if asked.rope.kind == "unchanged":
        _check_reach_of_the_present(model, length)
        return changed
    _check_rope(model, asked.rope)
    theta, scaling = _new_rope(config, model, asked, length)
    changed |= {"rope_theta": theta, "rope_scaling": scaling}
    if "rope_parameters" in changed:
        changed["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return changed


def _length(model: ModelConfig, asked: Extension) -> int:
    """The largest length that the new config names."""
    present, given = model.max_position_embeddings, asked.max_position_embeddings
    if given is not None and given < present:
        raise UserError(f"max_position_embeddings={given} must be at least the checkpoint's {present}: an extension does not shorten; drop the key")
    length = given or max(asked.seq_len, present)
    if asked.rope.kind == "yarn" and asked.rope.factor is not None and given is None:
        length = round(asked.rope.factor * _original(model, asked))
    if asked.seq_len > length:
        raise UserError(
            f"data.seq_len={asked.seq_len} must be at most the model's largest length, {length}; raise max_position_embeddings (rotary embeddings "
            "then stay as they are), or change both with prism extend"
        )
    return length


def _original(model: ModelConfig, asked: Extension) -> int:
    """The length that the checkpoint was trained with: longer distances are new to it."""
    scaling, given = model.rope_scaling, asked.rope.original_max_position_embeddings
    found = model.max_position_embeddings
    if scaling is not None:
        found = round(found / scaling.factor) if scaling.kind == "linear" else scaling.original_max_position_embeddings
    if model.sliding_window is not None and asked.sliding_window == "remove":
        found = min(found, model.sliding_window)
    if given is not None and (given > found or (scaling is not None and given != found)):
        raise UserError(f"rope.original_max_position_embeddings={given} contradicts the checkpoint, which was trained with {found}; drop the key")
    return given or found


def _check_window(model: ModelConfig, asked: Extension, length: int) -> None:
    window, kind = model.sliding_window, asked.rope.kind
    if window is None:
        if asked.sliding_window is not None:
            raise UserError(f"sliding_window={asked.sliding_window}: the checkpoint has no sliding window; drop the key")
        return
    if asked.sliding_window is None and (length > model.max_position_embeddings or kind != "unchanged"):
        raise UserError(
            f"the checkpoint's attention sees {window} tokens back, however long the sequence: say sliding_window=remove (every token, with a "
            "rope.kind for the new distances), or sliding_window=keep (what lies further back reaches a token through the layers alone)"
        )
    if asked.sliding_window == "keep" and kind != "unchanged":
        raise UserError(f"rope.kind={kind} with sliding_window=keep: rotary embeddings see no distance beyond {window} then; use rope.kind=unchanged")
    if asked.sliding_window == "remove" and kind == "unchanged":
        raise UserError(
            f"sliding_window=remove with rope.kind=unchanged: distances beyond {window} are new to the rotary embeddings; choose a rope.kind"
        )


def _check_reach_of_the_present(model: ModelConfig, length: int) -> None:
    scaling = model.rope_scaling
    if scaling is None or scaling.kind not in REACHING or length <= model.max_position_embeddings:
        return
    raise UserError(
        f"the checkpoint's {scaling.kind} scaling (factor {scaling.factor:g}) reaches {model.max_position_embeddings} positions, not {length}; "
        f"use rope.kind={scaling.kind}, whose factor then grows"
    )


def _check_rope(model: ModelConfig, rope: RopeChange) -> None:
    """Refuse what this checkpoint's rotary embeddings cannot take."""
    if model.position_embedding == "none":
        raise UserError(f"rope.kind={rope.kind}: the checkpoint has no rotary embeddings, and needs no change for longer sequences; drop [rope]")
    if rope.kind == "yarn" and model.no_rope_layers:
        raise UserError(
            f"rope.kind=yarn scales the attention of layers with rotary embeddings, which {len(model.no_rope_layers)} layers of this model do "
            "without; use theta, ntk, linear or llama3"
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind != rope.kind:
        raise UserError(
            f"rope.kind={rope.kind} contradicts the checkpoint, which has {scaling.kind} scaling with factor {scaling.factor:g} already; use "
            f"rope.kind=unchanged, or rope.kind={scaling.kind} with a larger factor"
        )
    if rope.theta is not None and rope.theta <= model.rotary_base:
        raise UserError(f"rope.theta={rope.theta:g} must be above the checkpoint's {model.rotary_base:g}, so that waves grow longer; raise it")


def _new_rope(config: Mapping[str, Any], model: ModelConfig, asked: Extension, length: int) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling)."""
    rope = asked.rope
    if rope.theta is not None:
        return rope.theta, None
    original = _original(model, asked)
    factor = rope.factor or length / original
    _check_factor(model, rope.kind, factor, original, length)
    if rope.kind == "ntk":
        return model.rotary_base * factor ** (model.kv_channels / (model.kv_channels - 2)), None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": float(factor)}
    if rope.kind == "linear":
        return model.rotary_base, scaling
    scaling["original_max_position_embeddings"] = original
    shape = SHAPES[rope.kind]
    if rope.kind == "llama3":
        scaling |= {name: DEFAULTS[name] for name in shape}
    present = (config.get("rope_scaling") or config.get("rope_parameters") or {}) if model.rope_scaling is not None else {}
    scaling |= {name: present[name] for name in shape if present.get(name) is not None}
    said = {name: getattr(rope, name, None) for name in (*shape, "attention_factor")}
    return model.rotary_base, scaling | {name: value for name, value in said.items() if value is not None}


def _check_factor(model: ModelConfig, kind: Kind, factor: float, original: int, length: int) -> None:
    """A factor must lengthen, beyond what the checkpoint has, and reach the length."""
    if factor <= 1:
        raise UserError(f"rope.kind={kind}: {length} positions are no more than the {original} that the checkpoint was trained with; drop [rope]")
    present = model.rope_scaling.factor if model.rope_scaling is not None else 1.0
    if factor <= present:
        raise UserError(f"rope.factor={factor:g} must be above the factor {present:g} that the checkpoint has; raise it, or use rope.kind=unchanged")
    if kind in REACHING and round(factor * original) < length:
        raise UserError(
            f"rope.factor={factor:g} times the original length {original} is {factor * original:.0f}, which does not reach {length}; "
            f"use rope.factor={length / original:g}"
        )
    if kind == "yarn" and round(factor * original) != length:
        raise UserError(
            f"rope.factor={factor:g} must be max_position_embeddings={length} / {original} = {length / original:g}: some readers of a config take "
            "the one, some the other; drop one of the two keys"
        )
