"""What a run takes in all: days, GPU-hours, money. Of training steps alone, at the predicted time of each."""

from dataclasses import dataclass

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Budget:
    """Of a number of steps."""

    steps: int
    tokens: int
    gpus: int
    seconds: float

    @property
    def days(self) -> float:
        """By the clock, without a pause."""
        return self.seconds / SECONDS_PER_DAY

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.seconds * self.gpus / 3600

    def describe(self, price: float | None) -> str:
        """In words; price of a GPU-hour in whatever money."""
        cost = f"; {self.gpu_hours * price:,.0f} at {price:g} a GPU-hour" if price is not None else ""
        return f"{self.tokens:,} tokens in {self.steps:,} steps: {readable_time(self.seconds)}, {self.gpu_hours:,.0f} GPU-hours{cost}"


def budget(tokens: int, tokens_per_step: int, gpus: int, step_seconds: float) -> Budget:
    """Of as many whole steps as the tokens ask for."""
    steps = -(-tokens // tokens_per_step)
    return Budget(steps, steps * tokens_per_step, gpus, steps * step_seconds)


def readable_time(seconds: float) -> str:
    """3.2 days, 5.1 hours, 12 minutes."""
    if seconds >= 2 * SECONDS_PER_DAY:
        return f"{seconds / SECONDS_PER_DAY:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"
