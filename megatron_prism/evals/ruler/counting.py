"""RULER's two counts: the ten words that a numbered list repeats most, and the three most frequent words of a coded text."""

import random
import string
from itertools import chain
from typing import Annotated

from pydantic import Field

from megatron_prism.config import Positive
from megatron_prism.evals.ruler.hay import words
from megatron_prism.evals.ruler.puzzle import Draw, Kind, Puzzle

COMMON_HEAD = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
COMMON_TAIL = "\nQuestion: What are the 10 most common words in the above list?"
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON, EXAMPLE_WORDS, EXAMPLE_REPEATS = 10, 40, (10, 3)
CODED_HEAD = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
CODED_TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
NUM_FREQUENT, CODED_LETTERS, DOTS = 3, 6, "..."
TOKENS_A_WORD = 50
"""a coded text of n tokens draws on n / 50 words"""


class CommonWords(Kind):
    """How often words are repeated. An example with its answer, of 40 words, stands before the question."""

    common_repeats: Positive = 30
    """of each of the ten common words"""
    other_repeats: Positive = 3
    """of each of the others"""

    def puzzle(self, draw: Draw) -> Puzzle:
        """See `Kind`; the size is the number of different words."""
        seed, drawn = draw.seed, list(words())
        random.Random(seed).shuffle(drawn)
        common, others = tuple(drawn[:NUM_COMMON]), drawn[NUM_COMMON:-EXAMPLE_WORDS]
        example = drawn[-EXAMPLE_WORDS:]
        shown = numbered(repeated(example[:NUM_COMMON], example[NUM_COMMON:], EXAMPLE_REPEATS, f"{seed} example"))
        answered = f"{COMMON_HEAD}{shown}{COMMON_TAIL}{COMMON_PREFIX}{numbered(example[:NUM_COMMON])}\n"
        repeats = (self.common_repeats, self.other_repeats)
        return Puzzle(
            answered + COMMON_HEAD,
            COMMON_TAIL,
            lambda size: numbered(repeated(common, others[: size - NUM_COMMON], repeats, f"{seed} order")),
            f"ten words {self.common_repeats} times, others {self.other_repeats} times",
            COMMON_PREFIX,
            common,
            smallest=NUM_COMMON,
            largest=len(others) + NUM_COMMON,
        )


class FrequentWords(Kind):
    """How fast frequencies fall: the word of rank k is a share k ^ -alpha / zeta(alpha) of the text; that of rank 1 is written as dots."""

    alpha: Annotated[float, Field(gt=1)] = 2.0
    """how fast"""

    def puzzle(self, draw: Draw) -> Puzzle:
        """See `Kind`; the size is the number of words that frequencies are shares of."""
        rng = random.Random(draw.seed)
        found: dict[str, None] = {}
        while len(found) < max(self.length // TOKENS_A_WORD, NUM_FREQUENT + 1):
            found["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
        coded = [DOTS, *list(found)[1:]]
        return Puzzle(
            CODED_HEAD,
            CODED_TAIL,
            lambda size: self._text(coded, size, f"{draw.seed} order"),
            f"coded words, the most frequent of {len(coded)} written as dots",
            CODED_PREFIX,
            tuple(coded[1 : NUM_FREQUENT + 1]),
            smallest=self._smallest(),
        )

    def _text(self, coded: list[str], size: int, seed: str) -> str:
        scale = size / zeta(self.alpha)
        drawn = list(chain.from_iterable([word] * int(scale * rank**-self.alpha) for rank, word in enumerate(coded, start=1)))
        random.Random(seed).shuffle(drawn)
        return " ".join(drawn)

    def _smallest(self) -> int:
        """From which size on the three are more frequent than the next, and each other."""
        ranks = range(2, NUM_FREQUENT + 3)

        def told_apart(size: int) -> bool:
            counts = [int(size / zeta(self.alpha) * rank**-self.alpha) for rank in ranks]
            return len(set(counts)) == len(counts)

        return next(size for size in range(1, 1 << 20) if told_apart(size))


def repeated(common: tuple[str, ...] | list[str], others: list[str], repeats: tuple[int, int], seed: str) -> list[str]:
    """All of them as often as asked, shuffled."""
    drawn = [*common] * repeats[0] + others * repeats[1]
    random.Random(seed).shuffle(drawn)
    return drawn


def numbered(listed: tuple[str, ...] | list[str]) -> str:
    """1. word 2. word ..."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))


def zeta(alpha: float) -> float:
    """Riemann's zeta function for alpha > 1: a sum of 1,000 terms and the integral of the rest, to 1e-9 at alpha = 2."""
    terms = 1000
    return sum(k**-alpha for k in range(1, terms)) + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2
