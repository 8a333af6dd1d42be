"""The RL proof's recipes and table, and what it looks into. The whole, with any model: reinforce.py --work DIR --model HF_DIR --quick --inside."""

import importlib.util
import json
import runpy
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_prism.config import load_recipe, merge, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.registry import load_task
from megatron_prism.rl.prompts import check_sources
from megatron_prism.stages import rl, train

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "smollm2_135m"


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_reinforce", FOLDER / "reinforce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_held_out_is_never_trained_on(proof: ModuleType, tmp_path: Path) -> None:
    files = {name: str(proof.task_file(Namespace(work=tmp_path), name)) for name in [*proof.TRAINED, *proof.HELD_OUT]}
    trained, held_out = ({load_task(files[name]).dataset for name in names} for names in (proof.TRAINED, proof.HELD_OUT))
    assert len(trained) == len(proof.TRAINED) and not trained & held_out
    table = merge(FOLDER / "reinforce.toml", ["output=o", "model.checkpoint=m"])
    table["prompts"] |= {"held_out_generators": list(proof.HELD_OUT), "sources": [{"task": files[name]} for name in proof.TRAINED]}
    assert validate(table, rl.Config, "proof").prompts.prompts_per_step == 32
    table["prompts"]["sources"].append({"task": files["aiw"]})
    with pytest.raises(UserError, match="aiw"):
        check_sources(validate(table, rl.Config, "proof").prompts)


def test_every_generator_takes_its_parameters_and_is_asked_after_two_answers(proof: ModuleType, tmp_path: Path) -> None:
    for name in [*proof.TRAINED, *proof.HELD_OUT]:
        task = load_task(str(proof.task_file(Namespace(work=tmp_path), name)))
        question = task.questions(2)[1]
        asked = task.prompt_for(question)
        assert asked.count("Answer:") >= 3 and asked.endswith("Answer:") and question.text.strip() in asked
        assert len(str(question.entry["answer"])) < 20


def test_the_mid_training_recipe_is_whole() -> None:
    assert load_recipe(FOLDER / "reinforce_midtrain.toml", ["output=o", "model.checkpoint=m", "data.blend=d"], train.Config).steps == 150


def write_scores(work: Path, name: str, solved: set[str], prose: float) -> None:
    """An evaluation in which 40 questions of every task were asked, and those of `solved` tasks answered right from the 10th on."""
    questions = [f"q{number}" for number in range(40)]
    right = {task: {question: float(task in solved and number >= 10) for number, question in enumerate(questions)} for task in ALL_TASKS}
    tasks = {task: {"accuracy": sum(found.values()) / 40, "correct": found} for task, found in right.items()}
    folder = work / "scores" / name
    folder.mkdir(parents=True)
    model = {"tasks": tasks, "perplexity": {"domains": {"general": {"loss": prose}}}}
    (folder / "scores.json").write_text(json.dumps({"models": {name: model}}))


ALL_TASKS = (
    "basic_arithmetic", "chain_sum", "gcd", "simple_equations", "syllogism", "letter_counting",
    "leg_counting", "base_conversion", "count_bits", "aiw", "family_relationships", "coin_flip",
)  # fmt: skip


def test_every_arm_stands_beside_the_start_with_its_interval(proof: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "solvable").mkdir()
    shares = {task: {"pass_at": {"1": 0.0, "16": 0.5 if task == "gcd" else 0.0}} for task in proof.TRAINED}
    (tmp_path / "solvable" / "scores.json").write_text(json.dumps({"models": {"start": {"tasks": shares}}}))
    seeds, names = [0, 1], ["start_0", "rl_0", "rl_1", "mid_0", "mid_1", "mid_rl_0", "mid_rl_1", "rl_long_0", "rl_random_0", "mid_long_0"]
    for name in names:
        write_scores(tmp_path, name, {"gcd"} if name == "rl_0" else set(), 3.5 if name == "rl_1" else 3.0)
    for name in ("rl_0", "rl_random_0"):
        (tmp_path / name / "samples").mkdir(parents=True)
        steps = [{"step": step, "reward": step / 20, "pass_rate": step / 20, "mismatch": 0.01} for step in range(1, 21)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    asked = Namespace(work=tmp_path, seeds=seeds, size="full", arms=[*proof.ARMS, *proof.CONTROLS])
    proof.show(asked, proof.summary(asked))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| rl | 2 |"))
    assert "| 37.50 (0.00 to 75.00) | +37.5 (+" in row and row.endswith("| 0.00 (0.00 to 0.00) | +0.0 (+0.0 to +0.0) | 3.25 (3.00 to 3.50) |")
    found = json.loads((tmp_path / "scores.json").read_text())
    place = found["arms"]["rl"]["groups"]["trained by RL"]
    assert found["arms"]["rl"]["training"] == [
        {"reward_first": 0.275, "reward_last": 0.775, "pass_rate_first": 0.275, "pass_rate_last": 0.775, "steps": 20, "mismatch_max": 0.01}
    ]
    assert "rl_random_0" in (tmp_path / "curves.svg").read_text() and "mid_0" not in (tmp_path / "curves.svg").read_text()
    assert found["rl_tasks"] == ["gcd"] and 0.25 < place["low"] < 0.375 < place["high"] < 0.5
    asked.arms = ["mid"]
    assert list(proof.summary(asked)["arms"]) == ["start", "mid"], "arms that nobody asked for need not be there"


def test_an_arm_waits_for_the_one_that_it_builds_on(proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = [], []

    def run(asked: Namespace, arm: str, gpu: int) -> None:
        began.append((arm, list(ended), gpu))
        time.sleep(0.05)
        ended.append(arm)

    monkeypatch.setattr(proof, "run_process", run)
    proof.run_all(Namespace(gpus=2, at_once=2), ["mid:0", "mid_rl:0", "mid_long:0", "rl:0"])
    before = {arm: there for arm, there, _ in began}
    assert "mid:0" in before["mid_rl:0"] and "mid_rl:0" in before["mid_long:0"] and {gpu for *_, gpu in began} <= {0, 1}


def parsed(proof: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Namespace:
    monkeypatch.setattr("sys.argv", ["reinforce.py", "--work", "runs/w", *words])
    return proof.arguments()


@pytest.mark.parametrize("size", ["small", "quick", "full"])
def test_what_is_looked_into_is_the_start_and_both_runs_and_every_recipe_is_whole(
    proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    asked = parsed(
        proof, monkeypatch, "--inside", "--seeds", "3", "--device", "cuda", *([f"--{size}"] if size != "full" else ["--arms", "mid", "mid_rl"])
    )
    asked.work = tmp_path
    looked: list[tuple[Path, dict[str, Path], dict[str, object], dict[str, object]]] = []
    monkeypatch.setattr(proof.runpy, "run_path", lambda path: {"look": lambda *given: looked.append((Path(path), *given[1:]))})
    monkeypatch.setattr(proof, "solvable", lambda asked: ["gcd"])
    proof.look_inside(asked)
    monkeypatch.undo()
    ((file, models, drawn, greedy),) = looked
    assert models == {"start": tmp_path / "start", "mid": tmp_path / "mid_3", "rl": tmp_path / "mid_rl_3"}
    made = runpy.run_path(str(file))["recipes"](asked, models, drawn, greedy)
    checked = [validate(recipe, stage.Config, stage.__name__) for stage, recipe in made]
    assert [cfg.output.name for cfg in checked] == ["analyze", "analyze_mid", "cka", "drawn", "behaviour", "landscape", "report"]
    weights, course, likeness, answers, _, landscape, page = checked
    assert (weights.series.run, weights.series.start, course.series.run) == (tmp_path / "mid_rl_3", "mid", tmp_path / "mid_3")
    assert (landscape.grid is not None) == (size == "full") and landscape.generation.temperature == 0.0
    assert {answers.generation.device, likeness.device, landscape.generation.device} == {"cuda"}
    assert {cfg.output for cfg in checked[:6]} < set(page.runs) and tmp_path / "scores" / "mid_rl_3" in page.runs


def test_the_runs_that_are_looked_into_keep_their_course_and_no_other_does(proof: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parsed(proof, monkeypatch, "--inside", "--seeds", "0", "1")
    assert proof.kept(asked, Path("w/mid_rl_0"), 60) == ["checkpoint.save_interval=10", "checkpoint.keep_last=none"]
    assert proof.kept(asked, Path("w/mid_1"), 60) == proof.kept(asked, Path("w/rl_0"), 60) == []
    assert proof.kept(parsed(proof, monkeypatch, "--seeds", "0"), Path("w/mid_rl_0"), 60) == []
    small = parsed(proof, monkeypatch, "--small", "--inside")
    assert (small.seeds, small.arms) == ([0], ["mid", "mid_rl"])
    with pytest.raises(SystemExit):
        parsed(proof, monkeypatch, "--inside", "--arms", "mid")
