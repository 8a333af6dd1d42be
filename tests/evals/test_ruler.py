"""RULER's puzzles: they fill a length in any tokenizer's tokens, their answers follow from their text alone, parts of an answer count."""

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted import Letters
from tiny_blend import write_source
from tiny_models import write_tokenizer

from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend
from megatron_prism.errors import UserError
from megatron_prism.evals import prompts
from megatron_prism.evals.registry import Task, load_suite, load_task, load_tasks
from megatron_prism.evals.ruler.counting import zeta
from megatron_prism.evals.scores import score
from megatron_prism.grading import Question, verdict

NIAH = list(load_suite("niah").tasks)
OFFLINE = list(load_suite("ruler_offline").tasks)


class Pieces:
    """A tokenizer of words and signs, with a chat template."""

    chat_template = "some"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": ["<s>"] * add_special_tokens + re.findall(r"\w{1,4}|[^\w ]", text)}

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> list[str]:
        return [piece for turn in turns for piece in [f"<{turn['role']}>", *self(turn["content"])["input_ids"], "<assistant>"]]


def asked(name: str, tokenizer: Any, count: int = 2, chat: bool = False, data_dir: Path | None = None) -> tuple[Task, list[Question], prompts.Asked]:
    task = load_task(name)
    questions = task.questions(count, data_dir)
    return task, questions, prompts.ask(task, questions, task.sampling(), tokenizer, chat)


def text_of(name: str) -> tuple[Question, str]:
    _, questions, found = asked(name, Letters(), 1)
    return questions[0], "".join(map(chr, found.prompts[0]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", OFFLINE)
def test_prompt_and_answer_fill_the_length_and_never_pass_it(name: str, chat: bool) -> None:
    for length in (4096, 8192):
        task, _, found = asked(f"{name}-{length}", Pieces(), chat=chat)
        assert all(0.95 * length < len(ids) + task.max_new_tokens <= length for ids in found.prompts)


@pytest.mark.parametrize("name", OFFLINE)
def test_questions_are_a_seeds_and_the_same_for_every_tokenizer_and_length(name: str) -> None:
    (task, questions, here), (_, again, _) = asked(f"{name}-4096", Pieces()), asked(f"{name}-8192", Letters())
    assert [question.entry for question in questions] == [question.entry for question in again]
    assert questions[0].entry["answers"] != questions[1].entry["answers"]
    assert here.prompts == prompts.ask(task, task.questions(2), task.sampling(), Pieces()).prompts


@pytest.mark.parametrize("name", NIAH)
def test_the_needles_for_the_keys_asked_for_are_the_answers(name: str) -> None:
    question, text = text_of(name)
    found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: ([\w-]+)\.", text)
    wanted = re.search(r"(?:What are all|What is) the special magic \w+ for (.+) mentioned in the provided text\? (The .+)$", text)
    assert wanted is not None and wanted[2].endswith(("text is", "text are"))
    keys = re.split(r", and |, ", wanted[1])
    assert sorted(value for key, value in found if key in keys) == sorted(question.entry["answers"])
    assert len({*question.entry["answers"]}) == load_task(name).params.get("num_values", 1) * load_task(name).params.get("num_queries", 1)
    assert len(found) == {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1) or "needles" in str(load_task(name).params)


def test_needles_lie_at_all_depths() -> None:
    _, questions, found = asked("niah_single_1-16384", Letters(), 40)
    texts = ["".join(map(chr, ids)) for ids in found.prompts]
    depths = [text.index(question.entry["answers"][0]) / len(text) for question, text in zip(questions, texts, strict=True)]
    assert [sum(low <= depth < low + 0.25 for depth in depths) > 3 for low in (0, 0.25, 0.5, 0.75)] == [True] * 4


def test_the_variables_of_the_chain_have_the_value() -> None:
    question, text = text_of("ruler_vt-8192")
    example, _, text = text.rpartition("Memorize and track")
    assert "they are: " in example
    value = re.search(r"assigned the value (\d+) in", text)
    assert value is not None
    having: list[str] = []
    for name, number, former in re.findall(r"VAR ([A-Z]+) = (?:(\d+)|VAR ([A-Z]+))", text):
        if number == value[1] or former in having:
            having.append(name)
    assert having == list(question.entry["answers"]) and len(having) == 5


def test_the_common_words_are_the_most_repeated() -> None:
    question, text = text_of("ruler_cwe-16384")
    counts = Counter(re.findall(r"\d+\. (\w+)", text.rpartition("Below is a numbered list")[2]))
    assert sorted(word for word, count in counts.items() if count == 30) == sorted(question.entry["answers"])
    assert Counter(counts.values())[3] == len(counts) - 10 > 10


def test_the_frequent_words_are_those_after_the_dots() -> None:
    question, text = text_of("ruler_fwe-8192")
    [(dots, _), *most, (_, fourth)] = Counter(text.partition("coded words. ")[2].partition("\n")[0].split()).most_common(5)
    assert dots == "..." and tuple(word for word, _ in most) == question.entry["answers"]
    assert most[-1][1] > fourth
    assert zeta(2.0) == pytest.approx(1.6449340668, abs=1e-8)


def test_a_length_that_does_not_hold_the_question_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"niah_single_1-200/.*length=200 must hold the question alone, \d+ tokens, and 128 for the answer; try length=1024"
    ):
        asked("niah_single_1-200", Letters())


def test_in_a_chat_the_answer_begins_in_the_models_turn() -> None:
    _, _, found = asked("niah_single_1-4096", Pieces(), chat=True)
    assert found.prompts[0][0] == "<user>"
    turn = found.prompts[0][found.prompts[0].index("<assistant>") :]
    assert turn[:4] == ("<assistant>", "The", "spec", "ial") and turn[-2:] == ("text", "is")


def test_the_page_names_the_hay_and_does_not_show_it() -> None:
    task = load_task("niah_single_2-131072")
    [question] = task.questions(1)
    assert "[prose (Python language reference, sha256 " in task.prompt_for(question) and len(task.prompt_for(question)) < 1000


def test_prose_of_yours_takes_the_place_of_the_reference(tmp_path: Path) -> None:
    (tmp_path / "essays.txt").write_text("A tale of mine. It is short.\n")
    _, [question], found = asked("niah_single_2-4096", Letters(), 1, data_dir=tmp_path)
    assert "A tale of mine. It is short. A tale of mine." in "".join(map(chr, found.prompts[0]))
    assert "essays.txt" in question.text
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "essays.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"essays\.txt holds no words: put prose there, or remove it"):
        load_task("niah_single_2").questions(1, empty)
    assert load_task("niah_single_1").questions(1, empty), "noise is no prose"


def test_a_prepared_sources_documents_can_be_the_prose(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "essays" / "tokenizer", 97)
    source = write_source(tmp_path / "essays", "tales", "train", [[10, 11, 12], [20, 21]], 97)
    write_blend(tmp_path / "essays" / "blend.toml", Blend(0, (BlendSource("tales", "general", 1.0, source.folder, None),)))
    _, [question], found = asked("niah_single_2-4096", Letters(), 1, data_dir=tmp_path)
    assert "w10 w11 w12 w20 w21 w10 w11" in "".join(map(chr, found.prompts[0]))
    assert "prose (essays, sha256 " in question.text


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {article} {number}. " + "So it goes. " * 20,
                    "qas": [
                        {"question": f"Which one, {article} {number}?", "answers": [{"text": f"{article} {number}"}], "is_impossible": False},
                        {"question": "And why?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(3)
            ]
        }
        for article in range(30)
    ]
}
HOTPOT = [
    {"question": f"Which {n}?", "answer": f"alpha {n}", "context": [[f"Title {n} {m}", [f"It is alpha {n}. ", "Or not. " * 20]] for m in range(2)]}
    for n in range(60)
]


@pytest.mark.parametrize(("name", "file", "content", "own"), [
    ("ruler_qa_squad", "squad/dev-v2.0.json", SQUAD, ["Paragraph 0 0", "Paragraph 0 1", "Paragraph 0 2"]),
    ("ruler_qa_hotpot", "hotpotqa/hotpot_dev_distractor_v1.json", HOTPOT, ["Title 0 0", "Title 0 1"]),
])  # fmt: skip
def test_questions_stand_among_as_many_documents_as_fit(name: str, file: str, content: Any, own: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"need {file}, and data_dir is not set; "):
        load_task(name).questions(1, None)
    with pytest.raises(UserError, match=f"need {file}, which is not in data_dir="):
        load_task(name).questions(1, tmp_path)
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    _, questions, found = asked(f"{name}-4096", Letters(), data_dir=tmp_path)
    text = "".join(map(chr, found.prompts[0]))
    assert all(title in text for title in own) and text.endswith("? Answer:")
    assert text.count("Document ") > 8 and 0.9 * 4096 < len(text) + 32 <= 4096
    assert verdict(questions[0], f"it is {questions[0].entry['answers'][0].upper()}").correct
    elsewhere = tmp_path / "other" / file  # a file that was read is not read again
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("[]" if name == "ruler_qa_squad" else "{}}")
    with pytest.raises(UserError, match="is not the published file"):
        load_task(name).questions(1, tmp_path / "other")


def test_every_part_of_an_answer_counts_and_letter_case_does_not() -> None:
    question = Question("q", "contains", "niah", {"answers": ("Alpha", "BETA", "12", "x y"), "credit": "all"}, "whole")
    assert verdict(question, "12, alpha, beta and X Y").correct
    half = verdict(question, "alpha and 12")
    assert (half.correct, half.score, half.reason, half.detail) == (False, 0.5, "part", "2 of 4 are there")
    assert verdict(question, "nothing").reason == "wrong" and verdict(question, " ").reason == "no_answer"
    any_one = Question("q", "contains", "qa", {"answers": ("alpha", "beta"), "credit": "any"}, "whole")
    assert verdict(any_one, "Beta!").correct and verdict(any_one, "gamma").reason == "wrong"


def test_parts_count_in_the_score() -> None:
    def record(name: str, reason: str, share: float) -> dict[str, Any]:
        return {
            "id": name,
            "correct": share == 1,
            "score": share,
            "reason": reason,
            "answer": "",
            "finish_reason": "stop",
            "num_tokens": 1,
            "logprob": -1.0,
        }

    found = score([record("a", "correct", 1.0), record("b", "part", 0.25), record("c", "wrong", 0.9)], votes=False)
    assert found.accuracy == pytest.approx(1.25 / 3) and found.pass_at == {1: pytest.approx(1 / 3)}


def test_names_with_a_length_are_tasks_and_suites_at_that_length() -> None:
    assert [task.name for task in load_tasks(["niah-8192"])] == [f"{name}-8192" for name in NIAH]
    assert load_task("ruler_vt-65536").params["length"] == 65536
    assert len(load_tasks(["ruler"])) == 13 * 6
    with pytest.raises(UserError, match=r"task 'aime24-4096': aime24 has no length"):
        load_task("aime24-4096")
    with pytest.raises(UserError, match="there is no task 'nothing-4096'"):
        load_task("nothing-4096")


def test_a_task_file_of_an_unknown_kind_or_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="source=ruler has no dataset='hay'; known: niah"):
        Task(name="x", domain="d", source="ruler", dataset="hay")
    with pytest.raises(ValueError, match="unknown key colour"):
        Task(name="x", domain="d", source="ruler", dataset="niah", params={"haystack": "noise", "colour": 1})


def test_a_question_goes_to_the_graders_without_its_hay() -> None:
    [question] = load_task("ruler_cwe").questions(1)
    sent = pickle.loads(pickle.dumps(question))
    assert type(sent) is Question and sent == Question(question.text, question.grader, question.dataset, question.entry, question.extraction)
    assert verdict(sent, " ".join(question.entry["answers"])).correct
