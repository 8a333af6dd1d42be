"""Tasks are files; their questions are held out, and training data cannot hold one by any seed."""

import random
from pathlib import Path

import pytest
import reasoning_gym

from megatron_prism.errors import UserError
from megatron_prism.evals.registry import HELD_OUT_SEED, Task, known_suites, known_tasks, load_suite, load_task, load_tasks
from megatron_prism.grading import verdict

SMALL = {"name": "small", "domain": "math", "dataset": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
MADE = [name for name in known_tasks() if load_task(name).source == "reasoning_gym"]


@pytest.mark.parametrize("name", MADE)
def test_every_task_that_makes_its_questions_makes_them_again(name: str) -> None:
    task = load_task(name)
    random.seed(1)
    questions = task.questions(30)
    assert len(questions) == 30
    assert all(question.text in task.prompt_for(question) and question.entry["answer"] for question in questions)
    random.seed(2)  # list_functions draws from Python's own random numbers too
    state = random.getstate()
    assert task.questions(30) == questions
    assert task.questions(3) == questions[:3] and random.getstate() == state


@pytest.mark.parametrize("name", MADE)
def test_the_generators_own_answers_are_correct_and_those_to_other_questions_are_not(name: str) -> None:
    questions = load_task(name).questions(20)
    answers = [str(question.entry["answer"]) for question in questions]
    assert all(verdict(question, f"So:\nAnswer: {answer}").correct for question, answer in zip(questions, answers, strict=True))
    other = next(answer for answer in answers if answer != answers[0])
    assert verdict(questions[0], f"Answer: {other}").reason == "wrong"


def test_suites_are_lists_of_tasks_and_stand_for_them() -> None:
    assert known_suites() == ["niah", "offline", "prism_six", "ruler", "ruler_offline"]
    assert [task.source for task in load_suite("offline").load()] == ["reasoning_gym"] * 12
    assert [task.name for task in load_tasks(["chain_sum", "prism_six", "aime24"])] == ["chain_sum", *load_suite("prism_six").tasks]
    with pytest.raises(UserError, match="known: niah, offline, prism_six"):
        load_suite("no_such_suite")


def test_a_suite_of_unknown_tasks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nabout = "x"\ntasks = ["gcd", "no_such_task"]\n')
    with pytest.raises(UserError, match="no task 'no_such_task'"):
        load_suite(str(file))


def test_benchmarks_have_no_training_data() -> None:
    with pytest.raises(UserError, match="no training data"):
        load_task("aime24").training_entries(0, 1)


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


def test_a_training_question_is_named_by_the_number_it_is_drawn_from_whatever_range_asks_for_it() -> None:
    task = Task(**SMALL, num_questions=60)  # which leaves gaps
    early, late = ({question.id: question.text for question in task.training_questions(seed, 20)} for seed in (0, 7))
    assert len(early) < 20
    assert {early[name] == late[name] for name in early.keys() & late.keys()} == {True}
    assert early.keys() & late.keys() == {f"{task.name}/train/{number}" for number in range(7, 20)} & early.keys()


def test_neighbouring_seeds_share_questions_which_is_why_the_ranges_are_apart() -> None:
    first, second = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=10) for seed in (100, 103))
    assert first[3]["question"] == second[0]["question"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "no place"}, "must hold"),
        ({"extraction": "no_such"}, "extraction rule"),
        ({"unknown": 1}, "unknown key"),
        ({"seed": 17}, "seed=17"),  # training seeds
        ({"name": "perplexity"}, "name='perplexity' is what an evaluation calls a folder of its own"),
        ({"name": "hf_mine"}, "name='hf_mine' is what"),
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
