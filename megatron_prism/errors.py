"""The one exception for people: what they gave us cannot work, and here is the rule, the values and the fix."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone (no traceback) and exits with status 2.

    A message names the rule, the values that break it, and what to do:
    `parallel.tp=3 must divide num_attention_heads=32; try parallel.tp=4`.
    Broken invariants of our own are `assert`s, never this. On many ranks, a message that all of them have is printed by rank 0 alone.
    """


ERROR_FILE = "PRISM_ERROR_FILE"
"""Environment variable: a file that receives the message of a UserError, for the launcher that started this process."""
