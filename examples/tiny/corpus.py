"""The text of the quickstart: whatever every installation has at hand, as functions that `prism prep` calls.

prose    the Python language reference (pydoc's topics) and the descriptions of the installed packages
code     the modules of the Python standard library
tasks    reasoning-gym questions with their answers, short or worked out
"""

import pydoc_data.topics
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from megatron_prism.evals.registry import load_task

LONG_ENOUGH = 2_000
CUT_AT = 20_000
CODE_BYTES = 1_200_000


def prose() -> Iterator[str]:
    """English prose, about a million characters: chapters of the language reference, descriptions of packages."""
    yield from pydoc_data.topics.topics.values()
    about = [found.metadata for found in metadata.distributions()]
    descriptions = {each["Name"].lower(): str(each.get_payload() or each.get("Description") or "") for each in about}
    for _, text in sorted(descriptions.items()):
        if len(text) >= LONG_ENOUGH:
            yield _without_markup(text)[:CUT_AT]


def _without_markup(text: str) -> str:
    """A README without its badges, pictures and HTML."""
    kept = [line for line in text.splitlines() if not re.search(r"!\[|<[a-zA-Z/!]|^\s*\.\. |https?://\S{60}", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def code() -> Iterator[str]:
    """Modules of the standard library, in the order of their names."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        size += len(text)
        if size > CODE_BYTES:
            return
        yield text


def tasks(task: str, form: str, count: int, seed: int = 0, **params: Any) -> Iterator[str]:
    """Questions of an evaluation task's kind, none of them one of its own, each with its answer.

    form: "short" is the question and the answer, "worked" has the steps between them. params: change the task's, as for easier questions.
    """
    chosen = load_task(task)
    easier = chosen.model_copy(update={"params": {**chosen.params, **params}})
    for entry in easier.training_entries(seed, count):
        steps = f"{WORKED[chosen.dataset](entry['metadata'])}\n" if form == "worked" else ""
        yield f"{entry['question'].strip()}\n{steps}Answer: {entry['answer']}"


def running_totals(problem: dict[str, Any]) -> str:
    """6 + 4 - 7 becomes " 06 10 03": the total after each term. A total is as long as a term, so that the next term stands at one distance."""
    words = problem["expression"].split()
    totals = [int(words[0])]
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        totals.append(totals[-1] + int(f"{sign}{term}"))
    return "".join(f" {'-' if total < 0 else ''}{abs(total):02d}" for total in totals)


def legs(problem: dict[str, Any]) -> str:
    """3 bees, 2 dogs becomes 3x06=018, 2x04=008, 018+008=026, a line each."""
    products = [count * ANIMALS[animal] for animal, count in problem["animals"].items()]
    lines = [f" {count}x{ANIMALS[animal]:02d}={product:03d}" for (animal, count), product in zip(problem["animals"].items(), products, strict=True)]
    total = products[0]
    for product in products[1:]:
        lines.append(f" {total:03d}+{product:03d}={total + product:03d}")
        total += product
    return "\n".join(lines)


WORKED: dict[str, Callable[[dict[str, Any]], str]] = {"chain_sum": running_totals, "leg_counting": legs}
"""reasoning-gym's name of a data set -> the steps to an answer."""
