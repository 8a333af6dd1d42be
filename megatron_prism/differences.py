"""What differs between two nested tables, in words: keys by their dotted names, elements of lists by their numbers, long values where they differ."""

import json
from typing import Any

LONGEST = 80
BEFORE_DIFFERENCE = 20


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested tables, one text a key: `train.steps was 100, now 200`; `models has 2, had 3`."""
    found: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        found += _of_values(old.get(key), new.get(key), f"{prefix}{key}")
    return found


def shown(value: Any) -> str:
    """A value as one writes it in a recipe, its beginning where it is long; None is unset."""
    text = _text(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _of_values(was: Any, now: Any, name: str) -> list[str]:
    if was == now:
        return []
    if isinstance(was, dict) and isinstance(now, dict):
        return differences(was, now, f"{name}.")
    if isinstance(was, list) and isinstance(now, list) and not _are_short(was, now):
        found = [text for number, pair in enumerate(zip(was, now, strict=False)) for text in _of_values(*pair, f"{name}.{number}")]
        return found if len(was) == len(now) else [*found, f"{name} has {len(now)}, had {len(was)}"]
    before, after = _text(was), _text(now)
    same = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), min(len(before), len(after)))
    return [f"{name} was {_around(before, same)}, now {_around(after, same)}"]


def _are_short(*lists: list[Any]) -> bool:
    """Lists of plain values that are read at a glance, such as betas."""
    return all(len(_text(each)) <= LONGEST and not any(isinstance(item, (dict, list)) for item in each) for each in lists)


def _text(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, default=str)


def _around(text: str, place: int) -> str:
    """The part of a long text that `place` lies in."""
    start = max(place - BEFORE_DIFFERENCE, 0) if len(text) > LONGEST and place > LONGEST - BEFORE_DIFFERENCE else 0
    part = text[start : start + LONGEST]
    return ("..." if start else "") + part + ("..." if start + LONGEST < len(text) else "")
