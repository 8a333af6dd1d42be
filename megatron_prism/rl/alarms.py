"""Collapse, seen coming: figures of the last steps beside those of the first, each limit by a name and a key of its own. No torch here.

A run that an alarm ends has not saved the step that rang it. Owns: the window of figures that a checkpoint keeps, so that a resumed run judges
as the unbroken one. Judged over a window: entropy, length, KL, reward. Judged at every step: the mismatch of trainer and generator.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_prism.config import Block, Fraction, Positive, PositiveFloat
from megatron_prism.errors import UserError
from megatron_prism.rl.rewards import ENOUGH_GRADED

WATCHED = ("reward", "entropy", "length", "truncated", "kl", "gradings", "gradings_failed")


class AlarmConfig(Block):
    """When a run is stopped, rather than let go on into ruin. The paper states no limits; the defaults are ours, wide enough for noise."""

    window: Positive = 20
    """steps that are averaged; nothing but the mismatch is judged before the first so many are past"""
    mismatch: PositiveFloat | None = 0.3
    """nats: one step's mean |log p of the trainer - log p of the generator| over written tokens; none: off, as with each limit below"""
    entropy_below: Fraction | None = 0.05
    """times the entropy of the first window: the policy writes one thing alone"""
    entropy_above: PositiveFloat | None = 3.0
    """times the entropy of the first window: the policy writes noise"""
    length_below: Fraction | None = 0.1
    """times the length of the first window"""
    truncated_above: Fraction | None = None
    """share of responses that ran into the limit of their length"""
    kl_above: PositiveFloat | None = 1.0
    """nats a token, to the reference"""
    reward_drop: Fraction | None = 0.5
    """the share of the best window's reward that was lost, where that was above zero"""
    gradings_failed: Fraction | None = 0.5
    """share of a window's gradings that say nothing, of 16 and more: where few responses pass the format, reward.max_failed never sees enough"""


class CollapseError(UserError):
    """An alarm rang: the message names it, its limit, what was seen, and the checkpoint to go on from."""


@dataclass
class Watch:
    """What the alarms remember. first, recent: WATCHED figures of the first and of the last window of steps. best: of all windows' mean rewards."""

    window: int
    first: list[dict[str, float]] = field(default_factory=list)
    recent: deque[dict[str, float]] = field(default_factory=deque)
    best: float | None = None

    @classmethod
    def of(cls, window: int, state: Mapping[str, Any] | None) -> "Watch":
        """As `state()` kept it; one of another window's length begins anew."""
        if not state or state["window"] != window:
            return cls(window)
        return cls(window, list(state["first"]), deque(state["recent"]), state["best"])

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {**asdict(self), "recent": list(self.recent)}

    def see(self, figures: Mapping[str, float]) -> None:
        """Take in a step's figures (of WATCHED, those that there are)."""
        seen = {name: figures[name] for name in WATCHED if name in figures}
        if len(self.first) < self.window:
            self.first.append(seen)
        self.recent.append(seen)
        if len(self.recent) > self.window:
            self.recent.popleft()
        if len(self.recent) == self.window:
            reward = _mean(self.recent, "reward")
            self.best = reward if self.best is None else max(self.best, reward)

    def alarm(self, config: AlarmConfig) -> str | None:
        """What is wrong by the last window, in words; None: nothing, or too early to say."""
        if len(self.recent) < self.window:
            return None
        checks = (
            self._relative("entropy", config.entropy_below, above=False, key="entropy_below"),
            self._relative("entropy", config.entropy_above, above=True, key="entropy_above"),
            self._relative("length", config.length_below, above=False, key="length_below"),
            self._absolute("truncated", config.truncated_above, key="truncated_above"),
            self._absolute("kl", config.kl_above, key="kl_above"),
            self._reward(config.reward_drop),
            self._gradings(config.gradings_failed),
        )
        return next((text for text in checks if text is not None), None)

    def _relative(self, name: str, limit: float | None, above: bool, key: str) -> str | None:
        if limit is None or not self._has(name):
            return None
        now, then = _mean(self.recent, name), _mean(self.first, name)
        rings = now > limit * then if above else now < limit * then
        side = "above" if above else "below"
        return (
            f"alarms.{key}={limit:g}: {name} {now:.4g} over the last {self.window} steps is {side} {limit:g} x {then:.4g}, the first's"
            if rings
            else None
        )

    def _absolute(self, name: str, limit: float | None, key: str) -> str | None:
        """Over the steps of the last window that have the figure: a step without an update has no KL, and silences nothing."""
        measured = [seen for seen in self.recent if name in seen]
        if limit is None or not measured or (now := _mean(measured, name)) <= limit:
            return None
        return f"alarms.{key}={limit:g}: {name} is {now:.4g} over the last {self.window} steps"

    def _reward(self, drop: float | None) -> str | None:
        if drop is None or self.best is None or self.best <= 0 or (now := _mean(self.recent, "reward")) >= (1 - drop) * self.best:
            return None
        return f"alarms.reward_drop={drop:g}: reward {now:.4g} over the last {self.window} steps, after {self.best:.4g} in the best window"

    def _gradings(self, limit: float | None) -> str | None:
        """Over the steps of the last window that were counted: a run of an earlier release kept no such figures."""
        counted = [seen for seen in self.recent if "gradings" in seen]
        asked, failed = (sum(seen[name] for seen in counted) for name in ("gradings", "gradings_failed"))
        if limit is None or asked < ENOUGH_GRADED or failed <= limit * asked:
            return None
        return (
            f"alarms.gradings_failed={limit:g}: {failed:.0f} of {asked:.0f} gradings failed over the last {self.window} steps: what is right earns "
            "nothing; mend the grader (docs/grading.md)"
        )

    def _has(self, name: str) -> bool:
        return all(name in seen for seen in (*self.first, *self.recent))


def check_mismatch(mean: float, config: AlarmConfig) -> str | None:
    """What is wrong with one step's mismatch, in words. A mean that is no number is over every limit."""
    if config.mismatch is None or mean <= config.mismatch:
        return None
    return (
        f"alarms.mismatch={config.mismatch:g}: trainer and generator differ by {mean:.4g} nats a token: "
        "these responses are not the policy's; look at generation.dtype and precision, or at the weight sync"
    )


def _mean(figures: "deque[dict[str, float]] | list[dict[str, float]]", name: str) -> float:
    return sum(seen[name] for seen in figures) / len(figures)
