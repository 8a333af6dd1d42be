"""Where the merged models of a landscape lie, and of what they are made (arXiv 2603.17074, Eq. 3). Pure; no torch.

    W(alpha, beta) = W_base + alpha (W_MT - W_base) + beta (W_RL - W_MT)
                   = (1 - alpha) W_base + (alpha - beta) W_MT + beta W_RL

(0, 0) is the base, (1, 0) the mid-trained model, (1, 1) the model after RL. The path goes straight from each to the next: position 0 is the base, 1
the mid-trained model, 2 the one after RL; positions before 0 and behind 2 go on beyond them, as do points of a grid outside of 0 to 1.
Owns: points, their names, their shares of the three models.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

DIGITS = 12
"""to which coordinates are rounded, so that 0.1 + 0.2 is 0.3"""
Position = float
ModelName = Literal["base", "midtrain", "rl"]


class Place(NamedTuple):
    """One merged model."""

    alpha: float
    beta: float

    @classmethod
    def of(cls, alpha: float, beta: float) -> "Place":
        """Rounded; no negative zero."""
        return cls(round(alpha, DIGITS) + 0.0, round(beta, DIGITS) + 0.0)

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the base, the mid-trained model and the one after RL; they add up to 1."""
        return round(1.0 - self.alpha, DIGITS), round(self.alpha - self.beta, DIGITS), self.beta

    @property
    def name(self) -> str:
        """A file's name."""
        return f"a{self.alpha!r}_b{self.beta!r}"


def on_path(position: Position) -> Place:
    """The point at a position of the path."""
    return Place.of(position, 0.0) if position <= 1.0 else Place.of(1.0, position - 1.0)


def path_positions(points: int, legs: int) -> list[Position]:
    """Evenly spread positions: `points` on each leg, its two ends among them."""
    steps = points - 1
    return [round(step / steps, DIGITS) for step in range(legs * steps + 1)]


def grid(alphas: Sequence[float], betas: Sequence[float]) -> list[list[Place]]:
    """A row of points for each beta."""
    return [[Place.of(alpha, beta) for alpha in alphas] for beta in betas]
