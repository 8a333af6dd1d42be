"""N-gram files of the registry: every question is found in text, training questions of the same kind are not, templates say nothing."""

from types import SimpleNamespace

import pytest

from megatron_prism.config import load_recipe
from megatron_prism.data_prep.cleaning.ngrams import find_files, make_table, read_ngrams
from megatron_prism.data_prep.cleaning.scan import Plan, scan_texts
from megatron_prism.errors import UserError
from megatron_prism.evals import ngrams
from megatron_prism.evals.registry import load_task

TASKS = 'tasks=["chain_sum", "leg_counting"]'


def task_of(*texts):
    questions = [SimpleNamespace(id=f"t/{number}", text=text, entry={}) for number, text in enumerate(texts)]
    return SimpleNamespace(name="t", questions=lambda data_dir: questions)


def test_a_question_is_its_ngrams_and_a_short_one_is_itself_unless_too_short():
    found = ngrams.task_ngrams(task_of("a b c d e f", "g h, i J!", "x y"), n=5, min_words=3)
    assert [(line.question, line.text) for line in found.ngrams] == [("t/0", "a b c d e"), ("t/0", "b c d e f"), ("t/1", "g h i j")]
    assert (found.questions, found.too_short, found.template) == (3, 1, 0)


def test_ngrams_of_many_questions_are_the_template_and_left_out():
    texts = [f"please add these numbers {number} and one more" for number in range(4)]
    found = ngrams.task_ngrams(task_of(*texts), n=4, min_words=2, max_questions=3)
    assert "please add these numbers" not in {line.text for line in found.ngrams}
    assert found.template == 1 and len(found.ngrams) == 4 * 4
    with pytest.raises(UserError, match="no n-gram stands for its 4 questions"):
        ngrams.task_ngrams(task_of(*texts), n=4, min_words=20)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Whole questions as one n-gram: what these generated tasks need, whose questions share most of their words."""
    output = tmp_path_factory.mktemp("ngrams") / "out"
    return ngrams.run(load_recipe(None, [f"output={output}", "n=1000", TASKS], ngrams.Config))


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting"])
def test_every_question_is_found_and_training_questions_are_not(registry, name):
    task = load_task(name)
    table = make_table([read_ngrams(path) for path in find_files([registry])])
    questions = [f"Solve this.\n{question.text}\nThe answer is 7." for question in task.questions()]
    assert (scan_texts(questions, Plan(False, None, table, False)).code > 0).all()
    control = [entry["question"] for entry in task.training_entries(0, 1000)]
    flagged = scan_texts(control, Plan(False, None, table, False))
    same_words = [control[found.document] for found in flagged.contaminated]  # another sign between the same numbers, at most
    assert len(same_words) <= 10


def test_the_stage_runs_once_and_is_refused_for_unknown_tasks(registry, capsys):
    config = load_recipe(None, [f"output={registry}", "n=1000", TASKS], ngrams.Config)
    assert ngrams.run(config) == registry and capsys.readouterr().out == f"{registry} is finished and unchanged: nothing to do\n"
    ngrams.dry_run(config)
    assert "task chain_sum: 100 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="no task 'chain_sun'"):
        ngrams.run(load_recipe(None, [f"output={registry}", 'tasks=["chain_sun"]'], ngrams.Config))
