"""The block of a recipe that says when a run hangs. Checked before torch is imported; what looks after a run is `watchdog`."""

from megatron_prism.config import Block, PositiveFloat


class WatchdogSection(Block):
    """What ends a run that hangs: docs/survive.md. A rank makes progress with every micro-batch."""

    timeout_minutes: PositiveFloat = 10
    """without progress in a step"""
    long_timeout_minutes: PositiveFloat = 180
    """without progress in the first step, a save, an export, an evaluation, and whatever else of an RL step is not training"""
