"""Which prompts a model's samples leave: bands, topping up, failed gradings; samples are drawn once, whatever is killed; a model's real ones."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import make_tiny_model

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.data_prep.cleaning.ngrams import ngram_of, write_ngrams
from megatron_prism.data_prep.cleaning.words import words
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import records
from megatron_prism.grading import Question, Verdict, graders, verdict
from megatron_prism.rl.prompt_files import PromptLine, read_prompts, write_prompts
from megatron_prism.rl.prompts import PromptConfig, load_prompts
from megatron_prism.rl.rewards import GraderAlarmError
from megatron_prism.rl.solvability import PassCount, SolvabilityConfig, gated, select
from megatron_prism.stages import prompts as stage

HERE = Path(__file__).parent
LETTERS = "etaoinshr"


def config(**settings: Any) -> SolvabilityConfig:
    return validate({"model": "somewhere", **settings}, SolvabilityConfig, where="test")


def line(domain: str, number: int, **fields: Any) -> PromptLine:
    given = {"id": f"{domain}/{number}", "domain": domain, "question": f"{domain} {number}", "grader": "exact", "entry": {"answer": "1"}}
    return PromptLine.model_validate({**given, **fields})


def counted(**rights: list[int]) -> tuple[list[PromptLine], dict[str, PassCount]]:
    """Prompts of domains, with how many of their 16 samples are right."""
    lines = [line(domain, number) for domain, some in rights.items() for number in range(len(some))]
    return lines, {f"{domain}/{number}": PassCount(right, 16, 0) for domain, some in rights.items() for number, right in enumerate(some)}


def ids(lines: list[PromptLine]) -> list[str]:
    return [line.id for line in lines]


def test_the_papers_rule_keeps_mathematics_solved_once_and_the_rest_solved_at_all() -> None:
    lines, counts = counted(math=[0, 1, 2, 16, 1], code=[0, 1, 16], science=[0, 0, 5])
    found = select(lines, counts, config())
    assert ids(found.lines) == ["math/1", "math/4", "code/1", "code/2", "science/2"]
    assert [(each.solved, each.samples) for each in found.lines] == [(1, 16), (1, 16), (1, 16), (16, 16), (5, 16)]
    assert found.domains["math"] == {"measured": 5, "kept": 2, "topped_up": 0, "prompts_by_right": {"0": 1, "1": 2, "2": 1, "16": 1}}


def test_a_balanced_mix_tops_smaller_domains_up_with_prompts_that_were_never_solved() -> None:
    lines, counts = counted(math=[1] * 6 + [0] * 9, code=[3, 0, 0, 0, 0, 0, 0, 0, 0, 0], science=[2, 0, 0])
    found = select(lines, counts, config(balanced=True))
    assert Counter(each.domain for each in found.lines) == {"math": 6, "code": 6, "science": 3}
    assert [each.solved for each in found.lines if each.domain == "code"].count(0) == 5
    assert {domain: figures["topped_up"] for domain, figures in found.domains.items()} == {"math": 0, "code": 5, "science": 2}
    assert ids(select(lines, counts, config(balanced=True)).lines) == ids(found.lines)
    assert ids(select(lines[::-1], counts, config(balanced=True)).lines) != ids(found.lines)  # their order is that of the lines, the choice is not
    assert set(ids(select(lines[::-1], counts, config(balanced=True)).lines)) == set(ids(found.lines))
    assert set(ids(select(lines, counts, config(balanced=True, seed=1)).lines)) != set(ids(found.lines))


def test_what_tops_a_domain_up_was_never_solved_not_solved_too_often() -> None:
    lines, counts = counted(math=[1, 5, 0, 16, 2], code=[1, 2, 3, 4])
    assert {each.id for each in select(lines, counts, config(balanced=True)).lines if each.domain == "math"} == {"math/0", "math/2"}


def test_bands_can_be_set_for_each_domain() -> None:
    lines, counts = counted(math=[0, 1, 8, 15, 16], code=[1, 2])
    found = select(lines, counts, config(keep={"math": {"at_least": 1, "at_most": 15}, "code": {"at_least": 2}}))
    assert ids(found.lines) == ["math/1", "math/2", "math/3", "code/1"]
    with pytest.raises(UserError, match=r"keep.math: at_least=3 and at_most=2 must be in order"):
        config(keep={"math": {"at_least": 3, "at_most": 2}})


def test_a_band_of_one_domain_leaves_the_papers_band_of_mathematics(tmp_path: Path) -> None:
    lines, counts = counted(math=[0, 1, 2], code=[1, 2])
    asked = config(keep={"code": {"at_least": 2}})
    assert ids(select(lines, counts, asked).lines) == ["math/1", "code/1"]
    asked.check_domains({"code"})  # mathematics was not asked for
    cfg = passing_on(tmp_path, solvability={"model": "somewhere", "keep": {"cdoe": {"at_least": 2}}})
    with pytest.raises(UserError, match=r"keep=\['cdoe'\] must name domains of the prompts, which are \['code', 'math'\]"):
        stage.run(cfg)
    assert not (tmp_path / "out").exists()


def test_a_prompt_whose_grading_failed_has_no_count_and_many_are_an_alarm() -> None:
    lines, counts = counted(math=[1] * 9 + [0], code=[0])
    counts["math/0"] = PassCount(1, 16, 1)
    assert "math/0" not in ids(select(lines, counts, config()).lines)
    counts["math/1"] = PassCount(0, 16, 16)
    counts["math/2"] = PassCount(0, 16, 3)
    with pytest.raises(GraderAlarmError, match=r"graders failed on 20 of 176 samples, solvability.max_failed=0.1 allows 17"):
        select(lines, counts, config())


def test_behind_the_gate_what_fails_the_format_has_no_answer() -> None:
    question = Question("?", "exact", "", {"answer": "7"})
    judge = gated(lambda pairs: (verdict(*pair) for pair in pairs), "required")
    right, ungated = judge([(question, "<think>a</think>\nAnswer: 7"), (question, "Answer: 7")])
    assert right.correct
    assert ungated == Verdict(False, 0.0, "no_answer")


def test_kill_9_again_and_again_draws_no_finished_sample_twice_and_counts_the_truth(tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "out.asked"
    command = [sys.executable, str(HERE / "killed_measure.py"), str(output)]
    for killed_after in (5, 14, 22):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3000):
            if log.is_file() and len(log.read_text().splitlines()) >= killed_after:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    found = eval(done.stdout, {"PassCount": PassCount})
    assert found == {f"p{place}": PassCount(min(place, 4), 4, 0) for place in range(8)}
    times = Counter(log.read_text().splitlines())
    assert len(times) == 32
    assert sum(times.values()) <= 32 + 3  # each kill costs the one in flight


def pool_file(path: Path) -> Path:
    """Prompts that a random model solves sometimes: its text holds a letter. One of them the evaluation asks."""
    lines = [line("math", n, grader="contains", extraction="whole", entry={"answers": [LETTERS[n]], "credit": "any"}) for n in range(9)]
    lines += [line("code", n, grader="contains", extraction="whole", entry={"answers": [LETTERS[n] * 9], "credit": "any"}) for n in range(6)]
    lines += [line("code", 6, grader="contains", extraction="whole", entry={"answers": ["a", "e", "i", "o", "t", "\n", " "], "credit": "any"})]
    asked = line("math", 99, question="Natalia sold clips to 48 of her friends in April", grader="exact", entry={"answer": "1"})
    write_prompts(path, [*lines, asked])
    return path


def recipe(tmp_path: Path, **solvability: Any) -> stage.Config:
    settings = {"samples": 6, "max_new_tokens": 6, "keep": {"math": {"at_least": 1, "at_most": 4}}, "grading_workers": 0, **solvability}
    given = {"output": str(tmp_path / "out"), "files": [str(tmp_path / "pool.jsonl")], "ngrams": [str(tmp_path / "gsm.jsonl")]}
    return validate({**given, "solvability": {"model": str(tmp_path / "model"), **settings}}, stage.Config, where="test")


def test_the_stage_measures_a_real_model_and_writes_what_a_run_reads(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    question = "natalia sold clips to 48 of her friends in april"
    write_ngrams(tmp_path / "gsm.jsonl", "gsm", 13, 1, [ngram_of("gsm/1", words(question))])
    pool_file(tmp_path / "pool.jsonl")
    cfg = recipe(tmp_path, balanced=True)
    output = stage.run(cfg)
    report = json.loads((output / "report.json").read_text())
    assert report["contaminated"] == {"gsm": 1}
    counts = [json.loads(row) for row in (output / "pass_counts.jsonl").read_text().splitlines()]
    assert len(counts) == 16
    assert {row["samples"] for row in counts} == {6}
    graded = Counter(record["id"] for record in records(output / "responses/model/prompts.jsonl.zst") if record["correct"])
    assert {row["id"]: row["right"] for row in counts} == {row["id"]: graded[row["id"]] for row in counts}
    mathematics, programs = (list(read_prompts(output / f"{domain}.jsonl")) for domain in ("math", "code"))
    assert {each.id for each in mathematics} == {row["id"] for row in counts if row["domain"] == "math" and 1 <= row["right"] <= 4}
    assert mathematics  # the test says something only where some are kept
    assert len(programs) == min(len(mathematics), 7)
    provenance = artifact.require(output, "prompts")
    assert provenance["solvability"]["samples"] == 6
    assert provenance["solvability"]["fingerprint"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sources = [{"file": str(output / f"{domain}.jsonl")} for domain in ("math", "code")]
    asked = load_prompts(PromptConfig.model_validate({"sources": sources, "prompts_per_step": 2}), tokenizer)
    assert len(asked.prompts) == len(mathematics) + len(programs)
    before = (output / "COMPLETE").read_text()
    stage.run(cfg)
    assert (output / "COMPLETE").read_text() == before
    write_prompts(tmp_path / "pool.jsonl", list(read_prompts(tmp_path / "pool.jsonl"))[1:])
    stage.run(cfg)  # nothing is drawn for it: the responses are there
    assert len((output / "pass_counts.jsonl").read_text().splitlines()) == 15


def test_prompts_from_nowhere_and_sets_without_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        validate({"output": "o"}, stage.Config, where="test")
    with pytest.raises(UserError, match="give the folder that holds the data sets"):
        validate({"output": "o", "sets": [{"recipe": "deepscaler"}]}, stage.Config, where="test")
    write_prompts(tmp_path / "a.jsonl", [line("math", 0)])
    twice = validate({"output": str(tmp_path / "o"), "files": [str(tmp_path / "a.jsonl")] * 2}, stage.Config, where="test")
    with pytest.raises(UserError, match="1 ids are there more than once, such as 'math/0'"):
        stage.run(twice)


def test_without_a_model_the_stage_cleans_and_passes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "deepscaler.jsonl").write_text("".join(json.dumps({"problem": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in range(5)))
    given = {"output": str(tmp_path / "out"), "sets": [{"recipe": "deepscaler", "sample": 3}], "data_dir": str(data)}
    cfg = validate(given, stage.Config, where="test")
    stage.dry_run(cfg)
    output = stage.run(cfg)
    assert len(list(read_prompts(output / "math.jsonl"))) == 3
    assert "deepscaler: 3 of 5 rows (left out: 2 beyond the sample)" in capsys.readouterr().out
    assert not (output / "pass_counts.jsonl").exists()


def passing_on(tmp_path: Path, **given: Any) -> stage.Config:
    """A recipe without a model over two prompts, one of each of two domains, and a folder of n-grams that is no artifact."""
    (tmp_path / "ngrams").mkdir()
    write_prompts(tmp_path / "pool.jsonl", [line("math", 0, question="How many clips did she sell to friends in all of May"), line("code", 0)])
    forbid(tmp_path, "a task of other words than these which no prompt of ours holds")
    paths = {"output": str(tmp_path / "out"), "files": [str(tmp_path / "pool.jsonl")], "ngrams": [str(tmp_path / "ngrams")]}
    return validate({**paths, **given}, stage.Config, where="test")


def forbid(tmp_path: Path, question: str, task: str = "clips") -> None:
    gram = words(question)
    write_ngrams(tmp_path / f"ngrams/{task}.jsonl", task, 13, 1, [ngram_of(f"{task}/1", gram)])


def prompt_names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*.jsonl"))


def test_an_output_made_again_holds_no_prompts_of_the_making_before(tmp_path: Path) -> None:
    cfg = passing_on(tmp_path)
    assert prompt_names(stage.run(cfg)) == ["code.jsonl", "math.jsonl"]
    forbid(tmp_path, "how many clips did she sell to friends in all of may")
    assert prompt_names(stage.run(cfg)) == ["code.jsonl"]
    artifact.verify(tmp_path / "out")


def test_an_ngram_file_that_came_into_a_plain_folder_is_noticed(tmp_path: Path) -> None:
    cfg = passing_on(tmp_path)
    stage.run(cfg)
    forbid(tmp_path, "how many clips did she sell to friends in all of may", task="another")
    assert prompt_names(stage.run(cfg)) == ["code.jsonl"]


def test_weights_that_changed_in_a_plain_folder_are_noticed_and_their_samples_not_mixed(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    keep = {"math": {"at_least": 0, "at_most": 2}, "code": {"at_least": 0}}
    cfg = passing_on(tmp_path, solvability={"model": str(tmp_path / "model"), "samples": 2, "max_new_tokens": 2, "grading_workers": 0, "keep": keep})
    stage.run(cfg)
    [weights] = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="drawn"):
        stage.run(cfg)


def test_a_file_in_the_output_is_refused_for_it_would_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pool.jsonl lies in output="):
        validate({"output": str(tmp_path), "files": [str(tmp_path / "pool.jsonl")]}, stage.Config, where="test")


def test_what_is_asked_is_decontaminated_beside_the_question_and_each_prompt_counted_once(tmp_path: Path) -> None:
    cfg = passing_on(tmp_path)
    asked = "How many clips did she sell to friends in all of May"
    hidden, both = line("math", 0, question="Solve it.", prompt=f"{asked}? Think."), line("math", 1, question=asked, prompt=f"{asked}? Think.")
    write_prompts(tmp_path / "pool.jsonl", [hidden, both, line("code", 0, prompt="Write it.")])
    forbid(tmp_path, asked)
    report = json.loads((stage.run(cfg) / "report.json").read_text())
    assert (report["decontaminated"], report["contaminated"], report["prompts"]) == (True, {"clips": 2}, {"code": 1})


def test_a_report_says_where_nothing_was_decontaminated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = passing_on(tmp_path, ngrams=[])
    stage.dry_run(cfg)
    assert "not decontaminated" in capsys.readouterr().out
    assert json.loads((stage.run(cfg) / "report.json").read_text())["decontaminated"] is False


def test_a_dry_run_finds_what_is_not_there(tmp_path: Path) -> None:
    stage.dry_run(passing_on(tmp_path))
    (tmp_path / "empty").mkdir()
    for name in ("nothing.jsonl", "empty"):
        given = {"output": str(tmp_path / "out"), "files": [str(tmp_path / "pool.jsonl")], "ngrams": [str(tmp_path / name)]}
        for act in (stage.dry_run, stage.run):
            with pytest.raises(UserError, match=rf"^ngrams: .*{name} is no n-gram file"):
                act(validate(given, stage.Config, where="test"))
    with pytest.raises(UserError, match=r"nowhere.jsonl is no prompt file"):
        stage.dry_run(validate({"output": str(tmp_path / "out"), "files": [str(tmp_path / "nowhere.jsonl")]}, stage.Config, where="test"))


def test_a_dry_run_names_a_graders_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "deepscaler.jsonl").write_text(
        json.dumps({"problem": "", "answer": 1}) + "\n" + json.dumps({"problem": "1 + 1?", "answer": 2}) + "\n"
    )
    write_prompts(tmp_path / "pool.jsonl", [line("math", 0), line("math", 1, grader="math")])
    model = {"output": str(tmp_path / "out"), "solvability": {"model": str(tmp_path / "model"), "samples": 2, "max_new_tokens": 2}}
    asked = [{"files": [str(tmp_path / "pool.jsonl")]}, {"sets": [{"recipe": "deepscaler"}], "data_dir": str(tmp_path)}]
    for each in asked:
        stage.dry_run(validate({**model, **each}, stage.Config, where="test"))
    monkeypatch.setattr(graders, "_installed", lambda module: module != "math_verify")
    for each in asked:
        with pytest.raises(UserError, match=r"the grader 'math' needs the package math_verify, which is not installed; pip install"):
            stage.dry_run(validate({**model, **each}, stage.Config, where="test"))


def test_where_no_prompt_is_kept_the_stage_says_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = passing_on(tmp_path)
    assert prompt_names(stage.run(cfg)) and "warning" not in capsys.readouterr().out
    asked = "How many clips did she sell to friends in all of May"
    write_prompts(tmp_path / "pool.jsonl", [line("math", 0, question=asked)])
    forbid(tmp_path, asked)
    assert prompt_names(stage.run(cfg)) == []
    assert "warning: no prompt was kept; every row was left out for the reasons above" in capsys.readouterr().out
    make_tiny_model(tmp_path / "model")
    never = {"model": str(tmp_path / "model"), "samples": 2, "max_new_tokens": 2, "grading_workers": 0}
    write_prompts(tmp_path / "pool.jsonl", [line("math", 0)])
    stage.run(cfg.model_copy(update={"output": tmp_path / "none", "solvability": SolvabilityConfig.model_validate(never)}))
    assert "set at_least and at_most of [solvability.keep.DOMAIN] by the counts above" in capsys.readouterr().out


def test_a_domain_that_has_the_name_of_the_counts_is_refused(tmp_path: Path) -> None:
    cfg = passing_on(tmp_path)
    write_prompts(tmp_path / "pool.jsonl", [line("pass_counts", 0)])
    with pytest.raises(UserError, match="domain='pass_counts' is what this stage calls a file of its own"):
        stage.run(cfg)
    assert not (tmp_path / "out").exists()
