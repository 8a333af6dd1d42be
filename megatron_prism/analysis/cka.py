"""Linear CKA of two representations of the same inputs, and its bootstrap. Pure functions of arrays; no torch.

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)         X [inputs, width], Y [inputs, another width]      (arXiv 2603.17074, Eq. 4)

of columns that have their mean taken off (Kornblith et al. 2019), or, uncentred, of columns as they are, which is how Eq. 4 is printed.
It is 1 for representations that are rotations and multiples of each other, and lies in 0 to 1.

Owns: the arithmetic, in float64, through inputs x inputs or width x width products, whichever are smaller; equal representations give 1 exactly.
Refuses: nothing; a representation in which all inputs are alike (or, uncentred, all zero) has no CKA, and is told by `None`.
Legend: n inputs, m inputs of a draw, d and e widths, k draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDING = 4.0
"""a spread of so many units in the last place of the largest value, in the type that the values came in, is none"""


@dataclass(frozen=True)
class Layer:
    """One layer's representation of the inputs, scaled by a power of two so that no product overflows, centred where asked for.

    values: float64 [n, d]; gram: its products of inputs [n, n], None where products of columns are smaller; varied: whether inputs differ.
    """

    values: Array
    gram: Array | None
    varied: bool
    centred: bool


@dataclass(frozen=True)
class Alike:
    """How alike two representations are. cka: of all inputs; draws: of each draw [k]; shuffled: mean over the draws, one side's inputs permuted."""

    cka: float
    draws: Array
    shuffled: float


def layer(values_nd: NDArray[np.floating], centred: bool = True) -> Layer:
    """A representation, made ready to be compared with any number of others."""
    largest = float(np.abs(values_nd).max(initial=0.0))
    values = np.ldexp(values_nd.astype(np.float64), -int(np.frexp(largest)[1]))
    if centred:
        values = values - values.mean(axis=0)
    spread = float(np.abs(values).max(initial=0.0))
    varied = spread > (ROUNDING * float(np.finfo(values_nd.dtype).eps) if centred else 0.0)
    n, d = values.shape
    return Layer(values, _product(values.T, values.T) if n <= d else None, varied, centred)


def linear_cka(one: Layer, other: Layer) -> float | None:
    """Of all inputs; None where either side's are all alike."""
    if not (one.varied and other.varied):
        return None
    return _cka(one, other, np.arange(len(one.values)))


def compare(one: Layer, other: Layer, draws_km: NDArray[np.int64]) -> Alike | None:
    """Of all inputs, and of each draw of some of them; None where either side's inputs, or those of a draw, are all alike."""
    whole = linear_cka(one, other)
    if whole is None:
        return None
    found = [_cka(one, other, chosen) for chosen in draws_km]
    unrelated = [_cka(one, other, chosen, np.roll(chosen, 1 + place % (len(chosen) - 1))) for place, chosen in enumerate(draws_km)]
    known, floor = ([value for value in values if value is not None] for values in (found, unrelated))
    if len(known) < len(found) or len(floor) < len(found):
        return None
    return Alike(whole, np.array(known), float(np.mean(floor)))


def draw(num_inputs: int, size: int, draws: int, seed: int) -> NDArray[np.int64]:
    """`draws` choices of `size` of the inputs, each in a random order and without an input twice: [k, m]. The same for every layer and pair."""
    return np.stack([np.random.default_rng([seed, number]).permutation(num_inputs)[:size] for number in range(draws)])


def minimum(layers: Sequence[Alike | None]) -> tuple[int, Array] | None:
    """The layer whose mean over the draws is least, and of each draw the least over all layers [k]; None where no layer has a figure."""
    known = [(place, found) for place, found in enumerate(layers) if found is not None]
    if not known:
        return None
    least = min(known, key=lambda item: float(item[1].draws.mean()))
    return least[0], np.min([found.draws for _, found in known], axis=0)


def _cka(one: Layer, other: Layer, chosen_m: NDArray[np.int64], of_other_m: NDArray[np.int64] | None = None) -> float | None:
    """Of some inputs. of_other_m: those of the other side, where they are not the same."""
    second = chosen_m if of_other_m is None else of_other_m
    if one.gram is not None and other.gram is not None:
        k, m = _centred_gram(one.gram, chosen_m, one.centred), _centred_gram(other.gram, second, other.centred)
        shared, own, others = (float((a * b).sum()) for a, b in ((k, m), (k, k), (m, m)))
    else:
        x, y = _centred(one.values[chosen_m], one.centred), _centred(other.values[second], other.centred)
        shared, own, others = (float((_product(a, b) ** 2).sum()) for a, b in ((y, x), (x, x), (y, y)))
    norm = float(np.sqrt(own * others))  # the root of a square is exact: equal sides give 1
    return shared / norm if norm else None


def _centred(values: Array, centred: bool) -> Array:
    return values - values.mean(axis=0) if centred else values


def _centred_gram(gram: Array, chosen_m: NDArray[np.int64], centred: bool) -> Array:
    """The products of `_centred` values of some inputs."""
    part: Array = gram[np.ix_(chosen_m, chosen_m)]
    if not centred:
        return part
    rows = part.mean(axis=0)
    return part - rows[:, None] - rows[None, :] + rows.mean()


def _product(a: Array, b: Array) -> Array:
    """a'b. numpy multiplies an array with its own transpose by another routine, with other last digits: equal sides must give equal products."""
    return np.asarray(a.T @ np.array(b), dtype=np.float64)
