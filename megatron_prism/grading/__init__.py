"""What an answer is worth. One function, `verdict`, decides; benchmark scores and RL rewards both wrap it (design law 7).

A leaf: imports only errors.
"""

from megatron_prism.grading.verdict import Question, Reason, Verdict, verdict

__all__ = ["Question", "Reason", "Verdict", "verdict"]
