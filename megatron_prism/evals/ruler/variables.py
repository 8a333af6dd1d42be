"""RULER's variable tracking: a value goes from variable to variable between lines of noise; which of them have it?

An example with its answer, of shorter names, stands before the question, as published: the model is told by it how to answer.
"""

import random
import string
from itertools import pairwise

from megatron_prism.config import Positive
from megatron_prism.evals.ruler.hay import NOISE
from megatron_prism.evals.ruler.puzzle import Draw, Kind, Puzzle

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TAIL = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the value {value}, they are:"
"""as published, with its slip of the pen; without the space at its end, as lm-eval has it"""
EXAMPLE_LINES = 10
NAME_LETTERS, EXAMPLE_NAME_LETTERS = 5, 3


class VariableTracking(Kind):
    """How long the chains are."""

    num_chains: Positive = 1
    """chains in the text; the first one is asked for"""
    num_hops: Positive = 4
    """assignments of a variable to the next, after the value's own"""

    def puzzle(self, draw: Draw) -> Puzzle:
        """See `Kind`."""
        rng = random.Random(draw.seed)
        example = self._part(rng, f"{draw.seed} example", EXAMPLE_NAME_LETTERS, "")
        shown = f"{example.prompt(EXAMPLE_LINES)}{example.prefix} {' '.join(example.answers)}\n\n\n\n"
        return self._part(rng, f"{draw.seed} places", NAME_LETTERS, shown)

    def _part(self, rng: random.Random, places: str, letters: int, before: str) -> Puzzle:
        names = _names((self.num_hops + 1) * self.num_chains, letters, rng)
        chains = [names[start : start + self.num_hops + 1] for start in range(0, len(names), self.num_hops + 1)]
        values = rng.sample(range(10_000, 99_999), self.num_chains)
        lines = [
            [f"VAR {chain[0]} = {value}", *(f"VAR {name} = VAR {former} " for former, name in pairwise(chain))]
            for chain, value in zip(chains, values, strict=True)
        ]
        return Puzzle(
            before + HEAD,
            TAIL.format(value=values[0]),
            lambda size: _context(lines, size, random.Random(places)),
            f"lines of noise with {self.num_chains} chain{'s' * (self.num_chains > 1)} of {self.num_hops + 1} variables",
            PREFIX.format(value=values[0], count=self.num_hops + 1),
            tuple(chains[0]),
            smallest=self.num_hops + 1,
        )


def _context(chains: list[list[str]], size: int, rng: random.Random) -> str:
    """`size` lines of noise, each chain's assignments among them in their order."""
    sentences = [f"{NOISE}\n"] * size
    for chain in chains:
        for done, (place, line) in enumerate(zip(sorted(rng.sample(range(len(sentences)), len(chain))), chain, strict=True)):
            sentences.insert(place + done, line)
    return " ".join(sentences).replace(". \n", ".\n")


def _names(count: int, letters: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)
