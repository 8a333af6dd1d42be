"""What a model family is: a map of its config.json, and its two-way weight rules. A variant is `dataclasses.replace` of another.

Owns: reading a config.json into a ModelConfig by that map. No torch.
Refuses: every key that would change the model and that the family does not implement, by its name; an unknown key that is off (null, false, empty)
changes nothing and passes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.families.rules import Drop, Part, Rule, Tied

Config = Mapping[str, Any]

_NAMES = """
_name_or_path architectures bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id dtype torch_dtype
transformers_version transformers.js_config use_cache id2label label2id num_labels problem_type return_dict output_attentions output_hidden_states
chunk_size_feed_forward finetuning_task task_specific_params name_or_path model_type is_llama_config max_length min_length do_sample temperature
top_k top_p typical_p repetition_penalty length_penalty diversity_penalty num_beams num_beam_groups num_return_sequences early_stopping
no_repeat_ngram_size encoder_no_repeat_ngram_size remove_invalid_values attn_implementation _attn_implementation _attn_implementation_autoset
unsloth_fixed unsloth_version neftune_noise_alpha tokenizer_class
"""
WITHOUT_EFFECT = frozenset(_NAMES.split())
"""config.json keys that do not change the function that the model computes"""


@dataclass(frozen=True)
class Layered:
    """A rule applied to one layer (None: outside the layers)."""

    rule: Rule
    layer: int | None
    """megatron-core's layer, from 0"""
    hf_layer: int | None = None
    """the layer of the Hugging Face model, from 0"""

    def key(self, model: ModelConfig) -> str:
        """megatron-core's global key. A hybrid model's layers have keys of their own; a dense one's share one, with a leading layer axis."""
        return self.rule.key if self.layer is None or not model.is_hybrid else numbered(self.rule.key, self.layer)

    def parts(self, model: ModelConfig) -> list[Part]:
        """The Hugging Face tensors of the rule, with the layer's number in their names."""
        layer = "" if self.hf_layer is None else str(self.hf_layer)
        return [Part(part.name.replace("{i}", layer), part.shape) for part in self.rule.parts(model)]


@dataclass(frozen=True)
class Family:
    """One model family as data. `hf_type` is config.json's model_type."""

    hf_type: str
    config: Mapping[str, str]
    """config.json key -> ModelConfig field"""
    weights: tuple[Rule | Tied | Drop, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """what transformers takes for a key of `config` that is missing or null: a value, or a function of the config"""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """keys of which only some values are implemented"""
    features: Mapping[tuple[str, ...], Callable[[Config], Mapping[str, Any]]] = field(default_factory=dict)
    """groups of keys -> ModelConfig fields read from them together"""
    ignored: tuple[str, ...] = ()
    """keys that published configs of this family carry and its model code does not read"""

    def model_config(self, hf_config: Config) -> ModelConfig:
        """The model that a config.json describes. Errors: UserError naming a key that is missing, of the wrong type, or not implemented."""
        self._refuse_unknown(hf_config)
        values: dict[str, Any] = {"family": self.hf_type}
        for key, name in self.config.items():
            values[name] = _typed(key, self._value(key, hf_config), name)
        for read in self.features.values():
            values |= read(hf_config)
        model = ModelConfig(**values)
        if model.num_attention_heads % model.num_query_groups:
            raise UserError(f"num_attention_heads={model.num_attention_heads} must be a multiple of num_key_value_heads={model.num_query_groups}")
        return model

    def rules(self, model: ModelConfig) -> Iterator[Layered]:
        """Every megatron-core tensor of a model, one entry for each layer, in the order of `weights` (layers outermost)."""
        kinds = {symbol for symbols in model.layer_symbols for symbol in symbols}
        rules = [rule for rule in self.weights if isinstance(rule, Rule) and rule.at in {None, *kinds} and rule.holds(model)]
        first = next((index for index, rule in enumerate(rules) if rule.layered), len(rules))
        yield from (Layered(rule, None) for rule in rules[:first])
        for layer, symbols in enumerate(model.layer_symbols):
            here = (rule for rule in rules if rule.layered and (rule.at is None or rule.at in symbols))
            yield from (Layered(rule, layer, layer // model.layers_per_block) for rule in here)
        yield from (Layered(rule, None) for rule in rules[first:] if not rule.layered)

    def num_parameters(self, model: ModelConfig) -> int:
        """Parameters of a model, each tied one once, without vocabulary padding."""
        return sum(prod(entry.rule.shape(model)) for entry in self.rules(model))

    def _value(self, key: str, config: Config) -> Any:
        if config.get(key) is not None:
            return config[key]
        if key not in self.defaults:
            raise UserError(f"config.json has no {key!r}, and {self.hf_type} has no default for it")
        default = self.defaults[key]
        return default(config) if callable(default) else default

    def _refuse_unknown(self, config: Config) -> None:
        for key, allowed in self.fixed.items():
            if config.get(key) is not None and config[key] not in allowed:
                values = " or ".join(repr(value) for value in allowed)
                fix = "; it acts in training alone, so 0 in config.json is the same model" if key.endswith("dropout") else ""
                raise UserError(f"{key}={config[key]!r} is not supported for {self.hf_type}; only {values}{fix}")
        known = {*self.config, *self.fixed, *self.ignored, *WITHOUT_EFFECT, *(key for keys in self.features for key in keys)}
        on = {key for key, value in config.items() if value not in (None, False, 0, "", [], {}) and not key.startswith("_")}
        unknown = sorted(on - known)
        if unknown:
            raise UserError(
                f"config.json of this {self.hf_type} model sets {', '.join(unknown)}, which this version does not implement; "
                "a key that does not change the model can be removed from config.json"
            )


def layer_kinds(config: Config, *keys: str) -> list[str] | None:
    """The list of layer kinds under the first of these keys that has one; None: none has. Errors: UserError for anything but a list of names."""
    key = next((key for key in keys if config.get(key)), None)
    if key is None:
        return None
    kinds = config[key]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"config.json says {key}={kinds!r}; it must be a list with the kind of each layer")
    return kinds


def size(config: Config, key: str, default: int | None = None) -> int:
    """A size that a feature reads: a positive whole number. Errors: UserError when it is something else, or missing without a default."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise UserError(f"config.json has no {key!r}, and its family has no default for it")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json says {key}={value!r}; it must be a positive number")
    return value


def numbered(key: str, layer: int) -> str:
    """The key of one layer's own tensor."""
    return key.replace("decoder.layers.", f"decoder.layers.{layer}.")


def kv_heads(default: int) -> Callable[[Config], int]:
    """transformers' default of num_key_value_heads for families with one of their own: as many as there are query heads where the key is null."""
    return lambda config: config["num_attention_heads"] if "num_key_value_heads" in config else default


_TYPES = {item.name: item.type for item in fields(ModelConfig)}


def _typed(key: str, value: Any, name: str) -> Any:
    wanted = _TYPES[name]
    if wanted is bool:
        right = isinstance(value, bool)
    elif wanted is int:
        right = isinstance(value, int) and not isinstance(value, bool) and value > 0
    else:
        right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not right:
        raise UserError(f"config.json says {key}={value!r}; it must be {'true or false' if wanted is bool else 'a positive number'}")
    return float(value) if wanted in (float, float | None) else value
