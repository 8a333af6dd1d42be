"""RULER's niah: sentences "One of the special magic numbers for KEY is: VALUE." in a haystack, and a question about some of the keys."""

import random
import uuid
from collections.abc import Sequence
from typing import Literal

from megatron_prism.config import Positive
from megatron_prism.evals.ruler.hay import NOISE, Prose, prose, words
from megatron_prism.evals.ruler.puzzle import Draw, Kind, Puzzle

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
HEAD = "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
TAIL = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = tuple(round(100 * place / 39) for place in range(40))
"""where needles go between sentences, in percent of them; none is drawn twice"""


class Niah(Kind):
    """What lies in which haystack."""

    haystack: Literal["noise", "essays", "needles"]
    """one line again and again; prose; lines like the needle, about other keys"""
    keys: Literal["words", "uuids"] = "words"
    """words: two, with a hyphen"""
    values: Literal["numbers", "uuids"] = "numbers"
    """numbers: of seven digits"""
    num_keys: Positive = 1
    """keys with a value in the text"""
    num_values: Positive = 1
    """values of each"""
    num_queries: Positive = 1
    """keys that are asked for"""

    def puzzle(self, draw: Draw) -> Puzzle:
        """See `Kind`."""
        rng, text_hay = random.Random(draw.seed), prose(draw.data_dir) if self.haystack == "essays" else None
        keys = distinct(self.keys, max(self.num_keys, self.num_queries), rng)
        values = {key: distinct(self.values, self.num_values, rng) for key in keys}
        needles = [self.line(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.num_queries)
        many = self.num_queries * self.num_values > 1
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"

        def text(template: str) -> str:
            return (template if many else _singular(template)).format(kind=self.values if many else self.values[:-1], query=query)

        lines = "lines of noise" if self.haystack == "noise" else "lines like the needle"
        hay = f"prose ({text_hay.name})" if text_hay else lines
        count = f"{len(needles)} needle{'s' * (len(needles) > 1)}"
        return Puzzle(
            text(HEAD),
            text(TAIL),
            lambda size: self.context(draw.seed, needles, keys, text_hay, size),
            f"{hay} with {count}",
            text(PREFIX),
            tuple(value for key in asked for value in values[key]),
            smallest=len(DEPTHS) if self.haystack == "essays" else len(needles),
        )

    def line(self, key: str, value: str) -> str:
        """A needle."""
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def context(self, seed: str, needles: Sequence[str], keys: Sequence[str], text_hay: Prose | None, size: int) -> str:
        """The haystack of `size` words of prose or lines, with the needles in it."""
        rng = random.Random(f"{seed} hay")
        if text_hay is not None:
            return _among_sentences(text_hay.sentences(size), needles, rng)
        places = random.Random(f"{seed} places").sample(range(size), len(needles))
        lines = [NOISE] * size if self.haystack == "noise" else [self._other(keys, rng) for _ in range(size)]
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _other(self, keys: Sequence[str], rng: random.Random) -> str:
        """A line about a key that is not asked for."""
        key = made(self.keys, rng)
        while key in keys:
            key = made(self.keys, rng)
        return self.line(key, made(self.values, rng))


def made(kind: str, rng: random.Random) -> str:
    """A key or a value."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return f"{rng.choice(words())}-{rng.choice(words())}" if kind == "words" else str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    """So many, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[made(kind, rng)] = None
    return list(found)


def _among_sentences(sentences: Sequence[str], needles: Sequence[str], rng: random.Random) -> str:
    places = [0, *sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles))), len(sentences)]
    parts = []
    for place, needle in enumerate([*needles, ""]):
        parts += [*sentences[places[place] : places[place + 1]], needle]
    return " ".join(parts[:-1])


def _singular(template: str) -> str:
    """One value is asked for: the published prompt's words for that."""
    return (
        template.replace("Some special magic {kind} are", "A special magic {kind} is")
        .replace("What are all", "What is")
        .replace("text are", "text is")
    )
