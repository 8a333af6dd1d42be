"""lm-eval's own tasks and scorers over our generator give, sample by sample, what its Hugging Face backend gives. Offline: tasks of our own."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import make_tiny_model

pytest.importorskip("lm_eval", reason="extra retention is not installed")

from megatron_prism import generate
from megatron_prism.config import load_recipe
from megatron_prism.errors import UserError
from megatron_prism.evals import retention
from megatron_prism.evals.lm_eval_adapter import LmEvalModel
from megatron_prism.evals.retention import Measure, RetentionSuite

COMMON = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
"""
OWN = {
    "choice": """
output_type: multiple_choice
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{question}} Answer:"
doc_to_choice: ["four", "five", "seven eight", "nine"]
doc_to_target: target
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "write": """
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [".", "t"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "roll": """
output_type: loglikelihood_rolling
num_fewshot: 0
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}
SUITE = RetentionSuite(
    name="tiny",
    about="x",
    tasks=(
        Measure(column="choice", task="tiny_choice", metrics=("acc,none",), choices=4),
        Measure(column="write", task="tiny_write", metrics=("exact_match,none",)),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    numbers = "one two three four five six seven eight nine ten".split()
    rows = [{"question": f"the cat sat on {' '.join(numbers[: place % 9 + 1])}", "target": place % 4} for place in range(12)]
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in OWN:
        write_task(path, name, path / "questions.jsonl")
    return path


def write_task(folder: Path, name: str, data: Path, like: str = "") -> None:
    """A task file of lm-eval's."""
    (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + OWN[like or name])


def evaluated(model: Any, tasks: Path, name: str) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model, tasks=[name], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), log_samples=True, bootstrap_iters=0
    )


@pytest.fixture(scope="module")
def folder_with_beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a token in front of every text, as LLaMA's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    path = make_tiny_model(tmp_path_factory.mktemp("beginning"), seed=4)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="the $A", special_tokens=[("the", tokenizer.convert_tokens_to_ids("the"))])
    tokenizer.bos_token = "the"
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_write", "tiny_roll"])
def test_every_sample_is_that_of_lm_evals_own_backend(folder: Path, tasks: Path, name: str) -> None:
    compare(folder, tasks, name)


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_write", "tiny_roll"])
def test_every_sample_is_the_same_where_texts_lose_their_beginning(folder: Path, tasks: Path, name: str) -> None:
    compare(folder, tasks, name, max_length=28)


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_write"])
def test_every_sample_is_the_same_where_the_tokenizer_puts_a_token_in_front(folder_with_beginning: Path, tasks: Path, name: str) -> None:
    compare(folder_with_beginning, tasks, name)


def compare(folder: Path, tasks: Path, name: str, max_length: int = 128) -> None:
    from lm_eval.models.huggingface import HFLM

    with generate.load(folder, batch_size=3, device="cpu") as generator:
        mine = evaluated(LmEvalModel(generator, max_length), tasks, name)
    other = evaluated(HFLM(pretrained=str(folder), device="cpu", batch_size=5, dtype="float32", max_length=max_length), tasks, name)
    assert mine["results"][name].keys() == other["results"][name].keys()
    rows = [(a, b) for a, b in zip(mine["samples"][name], other["samples"][name], strict=True)]
    assert len(rows) == 12
    for a, b in rows:
        assert a["arguments"] == b["arguments"]
        flat = [
            (x, y)
            for left, right in zip(a["resps"], b["resps"], strict=True)
            for one, two in zip(left, right, strict=True)
            for x, y in _pairs(one, two)
        ]
        for x, y in flat:
            assert x == (pytest.approx(y, abs=1e-4) if isinstance(y, float) else y)
    for metric, value in other["results"][name].items():
        assert mine["results"][name][metric] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def _pairs(one: Any, two: Any) -> list[tuple[Any, Any]]:
    return list(zip(one, two, strict=True)) if isinstance(one, list | tuple) else [(one, two)]


def test_what_was_written_differs_from_question_to_question_so_that_equal_means_something(folder: Path, tasks: Path) -> None:
    with generate.load(folder, device="cpu") as generator:
        samples = evaluated(LmEvalModel(generator, 128), tasks, "tiny_write")["samples"]["tiny_write"]
    assert len({sample["resps"][0][0] for sample in samples}) > 3


def test_a_text_longer_than_the_model_reads_is_scored_once_a_token(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    text = "the cat sat on the mat. " * 40
    with generate.load(folder, device="cpu") as generator:
        model = LmEvalModel(generator, 128)
        windows = list(model._windows(text))
        (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        scored = generator.score(windows)
    assert len(windows) > 1 and [token for _, part in windows for token in part] == model.tok_encode(text)
    assert total == pytest.approx(sum(sum(one.logprobs) for one in scored))


def test_contexts_that_are_too_long_lose_their_beginning_and_continuations_stay_whole(folder: Path) -> None:
    with generate.load(folder, device="cpu") as generator:
        model = LmEvalModel(generator, 16)
        assert model._fitted(list(range(1, 40)), [5, 6]) == (list(range(25, 40)), [5, 6])
        with pytest.raises(UserError, match="leaves no room"):
            model._fitted([1], list(range(17)))
        with pytest.raises(UserError, match="top_k"):
            model._sampling({"until": ["x"], "top_k": 5, "do_sample": True, "temperature": 1.0})


def test_the_stage_writes_scores_and_samples_and_runs_once(folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    suite = tmp_path / "tiny.toml"
    suite.write_text(tomli_w.dumps(SUITE.model_dump(exclude_none=True)))
    config = load_recipe(None, [f"output={tmp_path / 'out'}", f"model={folder}", f"suite={suite}", f"include={tasks}", "limit=5"], retention.Config)
    retention.dry_run(config)
    assert "choice: lm-eval's tiny_choice, its own shots" in capsys.readouterr().out
    assert retention.run(config) == tmp_path / "out"
    assert "| average |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    accuracy = found["results"]["tiny_choice"]["acc,none"]
    assert found["scores"]["choice"] == pytest.approx(max(0, (accuracy - 0.25) / 0.75))
    assert found["average"] == pytest.approx(sum(found["scores"].values()) / 2)
    assert len((tmp_path / "out" / "samples" / "tiny_choice.jsonl").read_text().splitlines()) == 5
    assert found["n-shot"]["tiny_choice"] == 2
    retention.run(config)
    assert "average" not in capsys.readouterr().out


def test_unknown_tasks_and_missing_data_are_named(folder: Path, tasks: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "gone", tmp_path / "gone.jsonl", like="choice")
    with generate.load(folder, device="cpu") as generator:
        for task, message in (("no_such", "has no task no_such"), ("tiny_gone", "cannot prepare task tiny_gone.*gone.jsonl")):
            suite = RetentionSuite(name="x", about="x", tasks=(Measure(column="x", task=task, metrics=("acc,none",)),))
            with pytest.raises(UserError, match=message):
                retention.measure(generator, suite, 128, include=tmp_path)
