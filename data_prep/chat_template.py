"""Conversations to text by a Hugging Face chat template, with the characters that the assistant wrote: what answers-only training learns.

A template with `{% generation %}` marks them itself. Without, they are found by rendering prefixes: turn i of the assistant is what the rendering of
the turns up to it adds to that of the turns before with the generation prompt, so it begins behind the role marker and holds what ends the turn. That
is true only of templates for which the rendering of a prefix is a prefix of the rendering (the prefix rule): others, such as those that take the
thoughts out of earlier answers, are refused by that name. Text and marks are transformers' (`apply_chat_template`).

A text that ends with the end of document ends there: white space that a template writes behind it (ChatML's line break) is left out, or the document
would end twice. All other text is transformers'.

Owns: rendering and marking. Refuses: templates without a rule for the marks, and templates that write today's date. Imports transformers when it is
used: in workers and in a process of its own, never in the caller.
"""

import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from megatron_prism.data_prep.answers import Marked
from megatron_prism.data_prep.formats import BadRecordError
from megatron_prism.data_prep.tokenizer import hide_torch
from megatron_prism.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user" if number % 2 else "assistant", "content": f"Probe number {number}."} for number in range(1, 5)]
REASON_CHARACTERS = 200

Turns = Sequence[dict[str, str]]


class Template(NamedTuple):
    """A chat template with all that it is given besides the turns. Plain values: it travels to the workers with every chunk.

    end: the end of document, as texts hold it.
    """

    source: str
    special_tokens: dict[str, Any]
    arguments: dict[str, Any]
    end: str | None = None

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself what the assistant wrote."""
        return GENERATION.search(self.source) is not None

    def render(self, turns: Turns) -> Marked:
        """The text of a conversation ({"role", "content"} each), and the ranges of characters that are the assistant's.

        Errors: BadRecordError where the template refuses the turns, or the prefix rule does not hold for them.
        """
        if self.marks_answers:
            return self._ended(self._rendered(turns, marks=True))
        text = self._rendered(turns).text
        return self._ended(Marked(text, tuple(self._by_prefixes(turns, text))))

    def _ended(self, marked: Marked) -> Marked:
        text = marked.text.rstrip()
        if self.end is None or not text.endswith(self.end):
            return marked
        return Marked(text, tuple((begin, min(end, len(text))) for begin, end in marked.answers or () if begin < len(text)))

    def _by_prefixes(self, turns: Turns, text: str) -> list[tuple[int, int]]:
        found = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._rendered(turns[:number], add_generation_prompt=True).text
            until = self._rendered(turns[: number + 1]).text
            if not (until.startswith(before) and text.startswith(until)):
                raise BadRecordError("chat template: prefix rule: the rendering of the first turns is not the beginning of the rendering of all")
            found.append((len(before), len(until)))
        return found

    def _rendered(self, turns: Turns, add_generation_prompt: bool = False, marks: bool = False) -> Marked:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {"strftime_now": None, **self.special_tokens, **self.arguments}
        try:
            (text,), ranges = render_jinja_template(
                conversations=[list(turns)],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **given,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            if "strftime_now" in self.source and isinstance(error, TypeError):
                raise BadRecordError("chat template: it writes today's date, so the data would change with the day it is prepared on") from None
            raise BadRecordError(f"chat template: {str(error)[:REASON_CHARACTERS]}") from None
        return Marked(text, tuple((begin, end) for begin, end in ranges[0]) if marks else None)


def check(templates: dict[str, Template]) -> None:
    """Try every source's template on two exchanges. Errors: UserError naming the source and the rule that does not hold.

    Works in a process of its own, so that transformers never weighs on the caller.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), hide_torch) as pool:
        found = pool.submit(_reasons, templates).result()
    for name, reason in found.items():
        raise UserError(
            f"source {name!r}: {reason}; set messages.arguments (as date_string, where the template knows it), or give messages.template, a .jinja "
            "file with {% generation %} around what the assistant writes"
        )


def _reasons(templates: dict[str, Template]) -> dict[str, str]:
    """What does not hold, by source."""
    found = {}
    for name, template in templates.items():
        try:
            marked = template.render(PROBE)
        except BadRecordError as error:
            found[name] = str(error)
            continue
        answers = [marked.text[begin:end] for begin, end in marked.answers or ()]
        missing = [turn["content"] for turn in PROBE[1::2] if not any(turn["content"] in answer for answer in answers)]
        if missing or any(turn["content"] in answer for turn in PROBE[::2] for answer in answers):
            found[name] = f"chat template: its marks are not what the assistant wrote: {answers} in {marked.text!r}"
    return found
