"""The six benchmarks on small files of the true shape: rows kept and dropped, entries, prompts, verdicts that are known; and what is refused."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest
from benchmark_files import ADD, TWICE, packed, problem, write_benchmarks

from megatron_prism.errors import UserError
from megatron_prism.evals import ngrams
from megatron_prism.evals.registry import Task, load_suite, load_task
from megatron_prism.evals.sources.livecodebench import unpack_tests
from megatron_prism.grading import Question, verdict

pytestmark = pytest.mark.filterwarnings("ignore:task .* where the benchmark has")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def asked(name: str, data: Path) -> dict[str, Question]:
    return {question.id.removeprefix(f"{name}/"): question for question in load_task(name).questions(data_dir=data)}


@pytest.mark.parametrize(
    ("name", "num_rows", "ids", "dropped"),
    [
        ("aime24", 2, ["60", "61"], {}),
        ("aime25", 3, ["aime2025-I.jsonl:1", "aime2025-II.jsonl:1", "aime2025-II.jsonl:2"], {}),
        ("math500", 1, ["test/prealgebra/1.json"], {}),
        ("livecodebench_v5", 7, ["abc2", "abc3", "abc5", "abc6"], {"contest before 2024-08": 2, "contest after 2025-01": 1}),
        ("codeforces", 3, ["1/A", "3/C"], {"interactive": 1}),
        ("gpqa_diamond", 20, [f"rec{number}" for number in range(20)], {}),
    ],
)
def test_rows_are_kept_and_dropped_as_counted_by_hand(data: Path, name: str, num_rows: int, ids: list[str], dropped: dict[str, int]) -> None:
    found = load_task(name).selection(data_dir=data)
    assert [question.id for question in found.questions] == [f"{name}/{one}" for one in ids]
    assert (found.num_rows, dict(found.dropped)) == (num_rows, dropped)


def test_the_protocol_is_the_papers() -> None:
    protocol = {task.name: (task.n, task.temperature, task.top_p, task.max_new_tokens) for task in load_suite("prism_six").load()}
    maths, others = (64, 0.6, 0.95, 32768), (3, 0.7, 1.0, 32768)
    assert protocol == {
        **dict.fromkeys(("aime24", "aime25", "math500"), maths),
        **dict.fromkeys(("livecodebench_v5", "codeforces", "gpqa_diamond"), others),
    }
    counts = {task.name: task.num_questions for task in load_suite("prism_six").load()}
    assert counts == {"aime24": 30, "aime25": 30, "math500": 500, "livecodebench_v5": 279, "codeforces": 453, "gpqa_diamond": 198}
    assert load_task("aime24").sampling(n=2, seed=7).seed == 7


def test_prompts_of_maths_and_answers_as_text(data: Path) -> None:
    questions = asked("aime24", data)
    assert load_task("aime24").prompt_for(questions["61"]) == "What is $5 \\cdot 5$?\n\nPlease put your final answer in \\boxed{} format."
    assert questions["61"].entry["answer"] == "025"


def test_known_verdicts_on_maths(data: Path) -> None:
    assert verdict(asked("aime24", data)["61"], "So it is \\boxed{25}.").correct
    assert verdict(asked("math500", data)["test/prealgebra/1.json"], "\\boxed{0.5}").correct
    assert verdict(asked("aime25", data)["aime2025-I.jsonl:1"], "\\boxed{71}").reason == "wrong"
    assert verdict(asked("aime25", data)["aime2025-I.jsonl:1"], "It is 70.").reason == "no_answer"


def test_programs_get_the_prompt_of_their_kind_and_their_hidden_tests(data: Path) -> None:
    task, questions = load_task("livecodebench_v5"), asked("livecodebench_v5", data)
    stdin, function = questions["abc2"], questions["abc3"]
    assert (stdin.grader, function.grader, function.entry["function"]) == ("code_stdin", "code_function", "scaled")
    assert task.prompt_for(stdin).startswith(
        "Generate an executable Python function generated from the given prompt. The function should take stdin as"
    )
    assert task.prompt_for(stdin).endswith(f"Simply call the function after the definition.{stdin.text}")
    assert "without invoking it" in task.prompt_for(function) and "def scaled(self" in task.prompt_for(function)
    assert stdin.entry["tests"] == questions["abc5"].entry["tests"] == [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7\n", "output": "12\n"}]
    assert dict(stdin.entry)["time_limit"] == 6 and "function" not in stdin.entry


def test_known_verdicts_on_programs(data: Path) -> None:
    questions = asked("livecodebench_v5", data)
    add = "```python\nprint(sum(map(int, input().split())))\n```"
    scaled = "```python\nclass Solution:\n    def scaled(self, nums, by):\n        return [by * one for one in nums]\n```"
    assert verdict(questions["abc2"], add).correct and verdict(asked("codeforces", data)["1/A"], add).correct
    assert verdict(questions["abc3"], scaled).correct
    assert verdict(questions["abc3"], scaled.replace("nums, by)", "nums: List[int], by: int) -> List[int]")).correct  # the signature as it is shown
    assert verdict(questions["abc2"], "```python\nprint(3)\n```").reason == "wrong"
    assert verdict(questions["abc3"], scaled.replace("by *", "2 *")).reason == "wrong"


def test_a_packed_entry_travels_packed(data: Path) -> None:
    entry = asked("livecodebench_v5", data)["abc2"].entry
    assert pickle.loads(pickle.dumps(entry))["tests"] == entry["tests"]
    assert set(entry) == {"tests", "time_limit", "statement"} and len(entry) == 3


class Evil:
    """Unpickled, it calls a function of its own choice."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl:1: private_test_cases must be text.*names posix\.mkdir"):
        unpack_tests(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), "a.jsonl:1")
    assert not (tmp_path / "unpickled").exists()
    assert unpack_tests(packed(ADD), "") == ADD


@pytest.mark.parametrize(
    "wrong", ["not base64!", base64.b64encode(b"not zlib").decode(), base64.b64encode(zlib.compress(pickle.dumps([1]))).decode()]
)
def test_other_packings_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="private_test_cases must be"):
        unpack_tests(wrong, "a.jsonl:1")


def test_the_codeforces_page_shows_the_editorial_as_the_harness_does_unless_told_otherwise(data: Path) -> None:
    questions = asked("codeforces", data)
    assert questions["1/A"].text == (
        "<html><body><h1>Sum</h1><div>Time limit per test: 2.0 s</div><h2>Description</h2><div>Add two numbers that stand on one line with one blank "
        "between them, please.</div><h2>Input Format</h2><div>Two integers.</div><h2>Output Format</h2><div>Their sum.</div><h2>Example</h2>"
        "<h3>Input</h3><div>1 2\n</div><h3>Output</h3><div>3\n</div><h2>Editorial</h2><div>Use plus.</div></body></html>"
    )
    assert "<h2>Note</h2><div>It may be negative.</div>" in questions["3/C"].text and "Editorial" not in questions["3/C"].text
    hidden = Task(**{**load_task("codeforces").model_dump(), "params": {"editorial": False}}).questions(data_dir=data)
    assert not any("Editorial" in question.text for question in hidden)
    assert (questions["1/A"].entry["time_limit"], questions["1/A"].entry["memory_limit"]) == (12.0, 256 << 20)
    assert (questions["3/C"].entry["time_limit"], questions["3/C"].entry["memory_limit"]) == (11.5, 256 << 20)


def test_gpqas_right_letter_is_always_d_under_the_papers_order_and_spread_under_the_other(data: Path) -> None:
    paper, mixed = asked("gpqa_diamond", data), asked("gpqa_diamond_mixed", data)
    assert {question.entry["answer"] for question in paper.values()} == {"D"}
    assert len({question.entry["answer"] for question in mixed.values()}) == 4
    assert asked("gpqa_diamond_mixed", data) == mixed
    for question in [*paper.values(), *mixed.values()]:
        assert question.entry["choices"]["ABCD".index(question.entry["answer"])] == "right"
    assert load_task("gpqa_diamond").prompt_for(paper["rec3"]) == (
        "Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your final response.\n"
        "Problem: Which is number 3,\nas a word?\nOptions: A) wrong 2, B) wrong 1, C) wrong 3, D) right\nAnswer:"
    )
    assert verdict(paper["rec3"], "\\boxed{D}").correct and verdict(paper["rec3"], "\\boxed{A}").reason == "wrong"


def test_a_data_set_of_another_size_is_warned_of_and_a_limit_reads_no_further(data: Path) -> None:
    with pytest.warns(UserWarning, match="task codeforces: 2 questions of 3 rows, where the benchmark has 453"):
        load_task("codeforces").questions(data_dir=data)
    found = load_task("aime25").selection(1, data)
    assert (len(found.questions), found.num_rows) == (1, 1)


def test_all_rows_may_stand_in_one_file_named_for_the_task(tmp_path: Path) -> None:
    (tmp_path / "aime25.jsonl").write_text(json.dumps({"question": "What is 1+1?", "answer": 2}) + "\n")
    (question,) = load_task("aime25").questions(data_dir=tmp_path)
    assert (question.id, question.entry["answer"]) == ("aime25/aime25.jsonl:1", "2")


def test_a_task_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text("")
    with pytest.raises(UserError, match=r"task aime24: no question is left of 0 rows \(the files are empty\)"):
        load_task("aime24").questions(data_dir=tmp_path)


def test_missing_files_are_named_with_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_task("aime25").questions(data_dir=tmp_path)
    for named in ("opencompass/AIME2025", "a6ad95f611d72cf628a80b58bd0432ef6638f958", "aime2025-II.jsonl", f"{tmp_path}/aime25.jsonl", "hf download"):
        assert named in str(caught.value)


def test_without_network_and_folder_the_error_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_task("gpqa_diamond").questions()
    for named in ("Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", "gpqa_diamond.csv", "FOLDER/gpqa_diamond.jsonl", "data_dir"):
        assert named in str(caught.value)


def test_a_task_that_pins_no_revision_is_read_from_a_folder_alone(tmp_path: Path) -> None:
    mine = Task(name="mine", domain="math", source="dataset", dataset="me/mine", files=("a.jsonl",), num_questions=1, extraction="boxed")
    with pytest.raises(UserError, match=r"pins no revision of me/mine.*data_dir"):
        mine.questions()
    with pytest.raises(UserError, match=r"lacks .*me/mine/a\.jsonl.*mine\.jsonl"):
        mine.questions(data_dir=tmp_path)
    (tmp_path / "me" / "mine").mkdir(parents=True)
    (tmp_path / "me" / "mine" / "a.jsonl").write_text('{"question": "What is 1+1?", "answer": "2"}\n')
    assert [question.id for question in mine.questions(data_dir=tmp_path)] == ["mine/a.jsonl:1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": "a"}], "has no field 'contest_date'"),
        ([problem(1, "2024-09-01", ADD), problem(1, "2024-09-02", ADD)], "second question of the name abc1"),
        ([problem(1, "2024-09-01", ADD, public_test_cases=[])], "must be str; it is list"),
        ([problem(1, "2024-09-01", ADD, public_test_cases="[")], "is no JSON"),
        (["text"], "must be a JSON object"),
        ([problem(1, "2024-09-01", TWICE, metadata="{}")], "metadata has no func_name"),
    ],
)
def test_rows_of_another_shape_are_refused_by_place(tmp_path: Path, rows: list[object], message: str) -> None:
    (tmp_path / "livecodebench_v5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        load_task("livecodebench_v5").questions(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"params": {"colour": 1}}, "unknown key"),
        ({"params": {"first_month": "2024-08"}}, "last_month"),
        ({"prompts": {"code_stdin": "no place"}}, "must hold"),
        ({"temperature": 0.0}, "greedy completions would all be equal"),
        ({"files": ()}, "needs files"),
    ],
)
def test_bad_files_of_benchmarks_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    import tomli_w

    content = {**load_task("livecodebench_v5").model_dump(exclude_unset=True), **wrong}
    (tmp_path / "bad.toml").write_text(tomli_w.dumps({key: value for key, value in content.items() if value != ()}))
    with pytest.raises(UserError, match=message):
        load_task(str(tmp_path / "bad.toml"))


def test_ngrams_of_a_benchmark_are_those_of_its_statements(data: Path) -> None:
    found = ngrams.task_ngrams(load_task("codeforces"), n=8, data_dir=data)
    assert found.ngrams[0].text == "add two numbers that stand on one line"
    assert found.questions == 2 and not any("html" in line.text or "editorial" in line.text for line in found.ngrams)
    assert all(
        "options" not in line.text for line in ngrams.task_ngrams(load_task("gpqa_diamond"), n=8, min_words=5, max_questions=20, data_dir=data).ngrams
    )
    assert ngrams.task_ngrams(load_task("livecodebench_v5"), n=20, data_dir=data).questions == 4
