"""What can happen to a run, drawn from a seed: kinds of fault, and where, when and to whom each one happens."""

import random
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("kill", "stop", "hang", "full", "disk", "flip", "nan", "term", "slow", "skew")
"""SIGKILL, SIGSTOP, a rank that never comes, a full disk, a bit on disk, a bit in memory, NaN, SIGTERM, a slow rank, a wrong clock"""
OFTEN = {"kill": 5, "stop": 2, "hang": 2, "full": 3, "disk": 4, "flip": 4, "nan": 3, "term": 3, "slow": 2, "skew": 2}
"""of 30"""
STEPS_EACH = {"slow": 24}
STEPS = 10
"""between one fault and the next"""
OFFSETS = ("+40h", "-40h", "+90s", "-90s", "+400d")


@dataclass(frozen=True)
class Fault:
    """One fault. step: not before this one is taken; how: the variant, in words; details: for the hook inside the rank."""

    number: int
    kind: str
    rank: int
    step: int
    how: str
    seed: int
    details: dict[str, Any]

    def plan(self) -> dict[str, Any]:
        """As the hook reads it."""
        kind = self.details.get("as", self.kind)
        return {**{key: value for key, value in asdict(self).items() if key != "details"}, **self.details, "kind": kind}


def draw(seed: int, kinds: list[str], ranks: int) -> list[Fault]:
    """A fault of each of these kinds, in this order."""
    chance, step, found = random.Random(seed), 4, []
    for number, kind in enumerate(kinds):
        at = step + chance.randrange(3)
        how, details = VARIANTS[kind](chance)
        found.append(Fault(number, kind, chance.randrange(ranks), at, how, chance.randrange(2**31), details))
        step += STEPS_EACH.get(kind, STEPS)
    return found


def steps_for(kinds: list[str]) -> int:
    """How many steps a run needs to meet all of them."""
    return 16 + sum(STEPS_EACH.get(kind, STEPS) for kind in kinds)


def mixture(seed: int, count: int) -> list[str]:
    """So many kinds, as often as OFTEN says, in an order drawn from the seed."""
    bag = [kind for kind, times in OFTEN.items() for _ in range(times)]
    chance = random.Random(seed)
    chance.shuffle(bag)
    return (bag * -(-count // len(bag)))[:count]


def _kill(chance: random.Random) -> tuple[str, dict[str, Any]]:
    return chance.choice([("in a step", {}), ("in a step", {}), ("in a save", {})])


def _full(chance: random.Random) -> tuple[str, dict[str, Any]]:
    return chance.choice([("before a save", {}), ("in the middle of a save", {"rank": 0})])


def _flip(chance: random.Random) -> tuple[str, dict[str, Any]]:
    of, bit = chance.choice(["weights", "weights", "moments"]), chance.randrange(32)
    moment = chance.choice(["flip", "flip before a save"])
    return f"bit {bit} of the {of}, {'between two steps' if moment == 'flip' else 'before a save'}", {"as": moment, "of": of, "bit": bit}


def _term(chance: random.Random) -> tuple[str, dict[str, Any]]:
    return chance.choice([("of a rank", {}), ("of the launcher", {"launcher": True})])


def _skew(chance: random.Random) -> tuple[str, dict[str, Any]]:
    offset = chance.choice(OFFSETS)
    return offset, {"offset": offset}


def _plain(how: str) -> Any:
    return lambda chance: (how, {})


VARIANTS = {
    "kill": _kill,
    "stop": _plain("SIGSTOP"),
    "hang": _plain("never reaches the next collective"),
    "full": _full,
    "disk": _plain("a bit of the newest checkpoint, after a kill"),
    "flip": _flip,
    "nan": _plain("a gradient, once"),
    "term": _term,
    "slow": _plain("0.25 s more in each forward pass, 15 steps"),
    "skew": _skew,
}
