"""RULER: what a model finds, follows and counts in a long context (Hsieh et al. 2024, arXiv 2404.06654), made here, for any tokenizer and length.

puzzle.py       what is asked, how much hay is put around it, filling a length in the model's own tokens
hay.py          the hay: noise sentences, prose, words
needles.py      niah: needles in a haystack, eight of the thirteen tasks
variables.py    variable_tracking
counting.py     common_words_extraction, freq_words_extraction
documents.py    qa: SQuAD and HotpotQA, from files of yours
Prompts, numbers and scores are the published ones, as read in lm-eval 0.4.13 (lm_eval/tasks/ruler), which follows github.com/NVIDIA/RULER. No
generator of lm-eval's is used: all but those of variable tracking and frequent words need a network, and those two draw from the process's stream.
Owns: the kinds by name. Refuses: lengths too short for what is asked, documents that are not there.
"""

from collections.abc import Mapping

from megatron_prism.evals.ruler.counting import CommonWords, FrequentWords
from megatron_prism.evals.ruler.documents import Qa
from megatron_prism.evals.ruler.needles import Niah
from megatron_prism.evals.ruler.puzzle import Draw, Kind, LongQuestion, Room, ask
from megatron_prism.evals.ruler.variables import VariableTracking

__all__ = ["KINDS", "Draw", "Kind", "LongQuestion", "Room", "ask"]

KINDS: Mapping[str, type[Kind]] = {
    "niah": Niah,
    "variable_tracking": VariableTracking,
    "common_words_extraction": CommonWords,
    "freq_words_extraction": FrequentWords,
    "qa": Qa,
}
"""RULER's names -> what a task's `[params]` are."""
