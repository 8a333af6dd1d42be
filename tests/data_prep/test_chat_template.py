"""Conversations under chat templates, and what of them the assistant wrote, against transformers' own text and mask."""

from pathlib import Path

import numpy as np
import pytest

from megatron_prism.data_prep import chat_template
from megatron_prism.data_prep.answers import tokens_of
from megatron_prism.data_prep.chat_template import Template
from megatron_prism.data_prep.formats import BadRecordError
from megatron_prism.errors import UserError

CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""As SmolLM2's, without its default system turn."""
GENERATION = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' %}[A]{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}
{% else %}[{{ message['role'] }}]{{ message['content'] }}
{% endif %}{% endfor %}"""
FORGETFUL = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' and not loop.last -%}{{ '[A]' + message['content'].split('</think>')[-1][:3] }}
{%- else -%}{{ '[' + message['role'] + ']' + message['content'] }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""
"""Earlier answers lose their end, as with templates that take thoughts out of them."""
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}|" + CHATML
SILENT = "{% for message in messages %}{{ message['content'] }}{% generation %}{% endgeneration %}{% endfor %}"

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Which one?"},
    {"role": "assistant", "content": "The ünïcode ☃ one."},
    {"role": "user", "content": "Sure?  "},
    {"role": "assistant", "content": "x = 1\n\nreturn"},
]


def template(source: str, **arguments: object) -> Template:
    return Template(source, {"bos_token": "<|end|>"}, arguments)


def test_prefixes_give_each_answer_with_what_ends_it_and_without_its_marker():
    marked = template(CHATML).render(TURNS)
    assert marked.text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\nThe ")
    answers = [marked.text[begin:end] for begin, end in marked.answers or ()]
    assert answers == ["The ünïcode ☃ one.<|im_end|>\n", "x = 1\n\nreturn<|im_end|>\n"]


@pytest.mark.parametrize(
    ("source", "left_out"),
    [(CHATML, ""), (CHATML.replace("im_end", "end"), "\n"), (GENERATION, ""), (GENERATION.replace("<|end|>", "<|end|>{{ ' \\n' }}"), " \n")],
)
def test_a_text_that_ends_itself_ends_once_and_is_transformers_up_to_there(source, left_out, tokenizer_folder):
    """White space behind the last end of document is left out, and nothing else ever."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    marked = Template(source, {"bos_token": "<|end|>"}, {}, end="<|end|>").render(TURNS)
    assert marked.text + left_out == tokenizer.apply_chat_template(TURNS, chat_template=source, tokenize=False, bos_token="<|end|>")
    assert marked.answers is not None and (whole := template(source).render(TURNS).answers) is not None
    assert marked.answers == (*whole[:-1], (whole[-1][0], whole[-1][1] - len(left_out)))
    assert Template(source, {"bos_token": "<|end|>"}, {}, end="<|other|>").render(TURNS).answers == whole


def test_text_ids_and_marks_are_those_of_transformers(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for conversation in (TURNS, TURNS[:3], TURNS[1:3] * 3):
        expected = tokenizer.apply_chat_template(
            conversation, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True, bos_token="<|end|>"
        )
        marked = template(GENERATION).render(conversation)
        assert marked.text == tokenizer.apply_chat_template(conversation, chat_template=GENERATION, tokenize=False, bos_token="<|end|>")
        tokenizer.backend_tokenizer.no_truncation()
        found = tokenizer.backend_tokenizer.encode(marked.text, add_special_tokens=False)
        assert found.ids == tokenizer(marked.text, add_special_tokens=False)["input_ids"]
        marks = tokens_of(marked.answers or (), np.array(found.offsets))
        assert found.ids[: len(expected["input_ids"])] == expected["input_ids"]
        assert marks[: len(expected["assistant_masks"])].astype(int).tolist() == expected["assistant_masks"]
        assert 5 < marks.sum() < len(marks) - 5


def test_a_template_for_which_a_prefix_is_no_prefix_is_refused_by_the_rules_name():
    with pytest.raises(BadRecordError, match="prefix rule"):
        template(FORGETFUL).render(TURNS)
    with pytest.raises(UserError, match=r"source 'chat': chat template: prefix rule: .*give messages.template, a .jinja"):
        chat_template.check({"good": template(CHATML), "chat": template(FORGETFUL)})


@pytest.mark.parametrize(
    ("source", "words"), [(DATED, "today's date"), (SILENT, "not what the assistant wrote"), ("{{ raise_exception('no') }}", "no")]
)
def test_what_a_template_does_wrong_is_said(source, words):
    reasons = chat_template._reasons({"s": template(source)})
    assert words in reasons["s"]


def test_a_template_that_is_told_the_date_is_taken():
    assert chat_template._reasons({"s": template(DATED, date_string="1 May 2025"), "t": template(CHATML), "u": template(GENERATION)}) == {}
    assert template(DATED, date_string="1 May 2025").render(TURNS).text.startswith("1 May 2025|<|im_start|>system")


def test_a_template_travels_to_a_worker():
    import pickle

    assert pickle.loads(pickle.dumps(template(CHATML))).render(TURNS) == template(CHATML).render(TURNS)


def test_a_template_without_a_tokenizer_or_a_file_is_refused(tmp_path: Path, tokenizer_folder: Path):
    from megatron_prism.config import validate
    from megatron_prism.data_prep.settings import SourceConfig
    from megatron_prism.data_prep.sources.selection import template_of
    from megatron_prism.data_prep.tokenizer import Tokenizer

    def source(**messages: object) -> SourceConfig:
        return validate({"name": "s", "paths": ["x.jsonl"], "messages": {"style": "template", **messages}}, SourceConfig, where="recipe")

    bare = Tokenizer("f", "{}", "h", 9, 0)
    with pytest.raises(UserError, match="the tokenizer has no chat template; give messages"):
        template_of(source(), bare)
    with pytest.raises(UserError, match="there is no tokenizer yet"):
        template_of(source(), None)
    with pytest.raises(UserError, match=r"template='none.jinja' is no file"):
        source(template="none.jinja")
    with pytest.raises(UserError, match="belong to style='template'"):
        source(style="chat", arguments={"a": 1})
    (tmp_path / "t.jinja").write_text(CHATML)
    given = source(template=str(tmp_path / "t.jinja"), arguments={"thinking": False})
    assert given.messages is not None and given.messages.template == CHATML
    assert template_of(given, bare) == Template(CHATML, {}, {"thinking": False})
    assert template_of(source(), bare._replace(chat_template="own {{x}}")) == Template("own {{x}}", {}, {})
