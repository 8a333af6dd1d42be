"""How a stage ends other than well: an error for people, with the rule, the values and the fix; or told to stop, before its work was done."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone (no traceback) and exits with status 2.

    A message names the rule, the values that break it, and what to do:
    `parallel.tp=3 must divide num_attention_heads=32; try parallel.tp=4`.
    Broken invariants of our own are `assert`s, never this. On many ranks, a message that all of them have is printed by rank 0 alone.
    """


class MachineError(UserError):
    """A disk or a network that failed, perhaps for now: status 1, and the launcher may start the same command again, as after a crash."""


class UnreadableError(UserError):
    """A file that this user may not read, or whose name leads to none: somebody has to mend that. What it holds is not known."""


NOT_KNOWN = (MachineError, UnreadableError)
"""Errors after which nobody knows what lies there: nothing is taken for damaged, unfinished or out of date because of them."""


class DivergenceError(RuntimeError):
    """A training step that went wrong in a way that its recipe does not let it go on from; the newest checkpoint is from before.

    The command line prints the message alone, once for all ranks, and exits with status 1: the same command would come to the same step.
    """


class PassingDivergenceError(DivergenceError):
    """A step that went wrong and may go right when it is taken again, as it did in a replay: why is not known.

    Also status 1, but no message for the launcher to give up with: the same command may go well, so it is started again as after a crash.
    """


class FaultyMachineError(PassingDivergenceError):
    """A step that went wrong by no fault of the run: its memory changed by itself."""


ERROR_FILE = "PRISM_ERROR_FILE"
"""Environment variable: a file that receives the message of a UserError, for the launcher that started this process."""

NEVER_AGAIN = ".never"
"""Ending of a second file beside that one: starting again would come to the same for certain, whatever went well before."""

STOPPED_EARLY = 75
"""Exit status of a stage that was told to stop (a signal, a time limit), has saved, and goes on when the same command is started again: "queue me
again" (sysexits' EX_TEMPFAIL)."""

STOPPED_FILE = "PRISM_STOPPED_FILE"
"""Environment variable: a file that is made by a stage that was told to stop, for the launcher that started this process: torchrun answers 1 for
whatever its ranks answer, and srun with the highest status of all tasks, among them those that it ended itself."""


class StoppedEarly(Exception):  # noqa: N818
    """No error: the stage was told to stop, and has saved. The command line exits with status 75."""
