"""How two models differ that should be one but for the values of their weights: shape and function (config.json), and tokenizer. No torch.

Owns: naming the first difference in a person's words. Chat templates, model cards and generation settings are no difference.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig

WITHOUT_EFFECT = frozenset({"init_method_std", "mamba.chunk_size"})
"""of a trained model: what its first weights were drawn from, and how its scan is tiled"""
POSITIONS = frozenset({"max_position_embeddings", "rotary_base", "rope_scaling"})
"""what an extension to longer sequences changes, and no weight's shape"""
TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken")
SETTINGS = ("normalizer", "pre_tokenizer", "post_processor")


def model_difference(one: ModelConfig, other: ModelConfig, leave: frozenset[str] = frozenset()) -> str | None:
    """The first size or constant in which two models differ: "num_layers is 4 and 8". leave: fields that may."""
    if one.family != other.family:
        return f"the family is {one.family} and {other.family}"
    left, right = _flat(asdict(one), leave), _flat(asdict(other), leave)
    for name in [*left, *(name for name in right if name not in left)]:
        if name not in WITHOUT_EFFECT and left.get(name) != right.get(name):
            return f"{name} is {left.get(name)!r} and {right.get(name)!r}"
    return None


def _flat(table: Mapping[str, Any], leave: frozenset[str], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in leave:
            found |= _flat(value, leave, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def tokenizer_difference(one: Path, other: Path) -> str | None:
    """What of two folders' tokenizers gives other ids, with their digests; None where they are one. Errors: UserError for an unreadable file."""
    left, right = tokenizer_parts(one), tokenizer_parts(other)
    digests = f"digests {digest(left)} and {digest(right)}"
    if not left.keys() & right.keys() and (left or right):
        return f"they have no tokenizer file in common: {', '.join(left) or 'none'} and {', '.join(right) or 'none'} ({digests})"
    for name in left:
        if name in right and left[name] != right[name]:
            return f"{name} differs: {_shown_difference(left[name], right[name])} ({digests})"
    return None


def digest(parts: Mapping[str, Any]) -> str:
    """The first 12 digits of a sha256 over what `tokenizer_parts` gave."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def tokenizer_parts(folder: Path) -> dict[str, Any]:
    """What decides the ids of a text: the parts of tokenizer.json, in one spelling; of a folder without it, digests of the older files."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    model = dict(content.get("model") or {})
    vocabulary, merges = model.pop("vocab", {}), model.pop("merges", [])
    return {
        "the vocabulary": vocabulary,
        "the list of merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "the model's settings": {name: value for name, value in model.items() if value},
        "the added tokens": {str(token["id"]): token["content"] for token in content.get("added_tokens") or []},
        **{f"the {name}": content.get(name) for name in SETTINGS},
    }


def _shown_difference(one: Any, other: Any) -> str:
    """The first entry that differs, short."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{_short(one)} and {_short(other)}"
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
    sizes = f", of {len(one)} and {len(other)} entries" if len(one) != len(other) else ""
    return f"{key!r} is {_short(one.get(key))} and {_short(other.get(key))}{sizes}"


def _short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
