"""Tasks are files; their questions are held out, and training data cannot hold one by any seed."""

from pathlib import Path

import pytest
import reasoning_gym

from megatron_prism.errors import UserError
from megatron_prism.evals.registry import HELD_OUT_SEED, Task, known_tasks, load_task

SMALL = {"name": "small", "domain": "math", "dataset": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


@pytest.mark.parametrize("name", known_tasks())
def test_every_task_of_the_registry_makes_its_questions(name: str) -> None:
    task = load_task(name)
    questions = task.questions(3)
    assert len(questions) == 3
    assert all(question.text in task.prompt_for(question) and question.entry["answer"] for question in questions)
    assert task.questions(3) == questions


def test_a_task_must_lie_in_the_held_out_range(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\ndomain = "math"\ndataset = "chain_sum"\nseed = 17\n')
    with pytest.raises(UserError, match="seed=17"):
        load_task(str(file))


def test_training_cannot_reach_into_the_held_out_range() -> None:
    task = Task(**SMALL)
    with pytest.raises(UserError, match="held out"):
        task.training_entries(HELD_OUT_SEED - 10, 11)
    assert len(list(task.training_entries(HELD_OUT_SEED - 10, 10))) <= 10


def test_no_held_out_question_is_among_the_training_questions_even_where_few_exist() -> None:
    task = Task(**SMALL, num_questions=60)  # 200 different questions in all, so that seeds alone would not keep them apart
    held_out = {question.text for question in task.questions()}
    training = [entry["question"].strip() for entry in task.training_entries(0, 500)]
    unfiltered = [reasoning_gym.create_dataset("chain_sum", seed=0, size=500, **task.params)[place]["question"].strip() for place in range(500)]
    assert held_out & set(unfiltered)
    assert not held_out & set(training)
    assert len(training) > 200


def test_neighbouring_seeds_share_questions_which_is_why_the_ranges_are_apart() -> None:
    first, second = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=10) for seed in (100, 103))
    assert first[3]["question"] == second[0]["question"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "no place"}, "must hold"),
        ({"extraction": "boxed"}, "extraction rule"),
        ({"unknown": 1}, "unknown key"),
    ],
)
def test_bad_task_files_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    import tomli_w

    file = tmp_path / "bad.toml"
    file.write_text(tomli_w.dumps({**SMALL, **wrong}))
    with pytest.raises(UserError, match=message):
        load_task(str(file))


def test_unknown_tasks_and_parameters_are_refused_with_what_is_known() -> None:
    with pytest.raises(UserError, match=f"known: .*{known_tasks()[0]}"):
        load_task("no_such_task")
    with pytest.raises(UserError, match="refuses dataset='chain_sum'"):
        Task(**{**SMALL, "params": {"colour": 1}}).questions()
    with pytest.raises(UserError, match="refuses dataset='no_such'"):
        Task(**{**SMALL, "dataset": "no_such", "params": {}}).questions()
