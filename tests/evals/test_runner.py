"""The runner draws every pair once whatever is killed, grades beside, joins what many ranks drew, and its true scores come out."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from killed_runner import FACTS, asked, judge, questions, text_of
from scripted import Scripted

from megatron_prism.errors import UserError
from megatron_prism.evals import runner
from megatron_prism.evals.frames import records
from megatron_prism.evals.ranks import Ranks
from megatron_prism.evals.responses import ResponseFolder, graded_as, pair_of
from megatron_prism.evals.scores import score
from megatron_prism.evals.sources.livecodebench import PackedEntry
from megatron_prism.grading import Question

HERE = Path(__file__).parent


def _start(output: Path, count: int, n: int, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(HERE / "killed_runner.py"), str(output), str(count), str(n)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_lines(path: Path, count: int) -> None:
    for _ in range(3000):
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not reach {count} lines")


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_kill_9_again_and_again_loses_and_repeats_nothing_that_was_finished(tmp_path: Path) -> None:
    output, count, n = tmp_path / "out", 30, 4
    folder = ResponseFolder(output, "model", "task")
    begun = 0
    for kill_after in (7, 25, 31):
        before = folder.answered()
        process = _start(output, count, n)
        _wait_for_lines(output.with_suffix(".asked"), begun + kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = output.with_suffix(".asked").read_text().splitlines()
        there = folder.answered()
        assert before <= there
        assert len(lines) - 1 <= len(there) + 2  # at most the one in flight of each killed session is not there
        begun = len(lines)
    kept = {pair_of(record): record["text"] for path in (output / "parts").rglob("responses.*") for record in records(path)}
    _finish(_start(output, count, n))
    found = list(folder.read())
    assert [pair_of(record) for record in found] == [(f"q{place}", sample) for place in range(count) for sample in range(n)]
    assert all(record["text"] == kept.get(pair_of(record), record["text"]) for record in found)
    times = Counter(output.with_suffix(".asked").read_text().splitlines())
    assert sum(times.values()) <= count * n + 3  # each kill costs the one response that was in flight
    assert all(record["correct"] == (record["sample"] % 2 == 0) for record in found)
    assert not (output / "parts" / "model" / "task").exists()


def test_ranks_share_the_work_and_one_that_dies_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    output, count, n = tmp_path / "out", 20, 4
    first, second = _start(output, count, n, 0, 2), _start(output, count, n, 1, 2)
    folder = ResponseFolder(output, "model", "task")
    _wait_for_lines(output.with_suffix(".asked"), 20)
    second.kill()
    second.wait()
    assert first.poll() is None
    _finish(_start(output, count, n, 1, 2))
    _finish(first)
    times = Counter(output.with_suffix(".asked").read_text().splitlines())
    assert sum(times.values()) <= count * n + 1
    assert len(times) == count * n == len(list(folder.read()))


def test_another_number_of_ranks_takes_over_what_is_left(tmp_path: Path) -> None:
    output, count, n = tmp_path / "out", 12, 2
    several = [_start(output, count, n, rank, 3) for rank in (1, 2)]  # rank 0 never came
    for process in several:
        _finish(process)
    assert len(ResponseFolder(output, "model", "task").answered()) == 16
    _finish(_start(output, count, n))
    assert Counter(output.with_suffix(".asked").read_text().splitlines()).most_common(1)[0][1] == 1
    assert len(list(ResponseFolder(output, "model", "task").read())) == count * n


def test_rank_0_says_which_rank_died_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    folder, ranks = ResponseFolder(tmp_path, "model", "task"), Ranks(tmp_path, 0, 2, patience_seconds=0.5)
    runner.draw(lambda: Scripted(text_of), folder, asked(4, 2), ranks, judge)
    with pytest.raises(UserError, match=r"rank 1 of 2 gave no sign of life.*kept"):
        runner.join(folder, asked(4, 2), ranks, judge, FACTS)
    assert len(folder.answered()) == 4


def _run(output: Path, count: int, n: int, judge=judge) -> Scripted:
    folder, ranks, generator = ResponseFolder(output, "model", "task"), Ranks(output), Scripted(text_of)
    runner.draw(lambda: generator, folder, asked(count, n), ranks, judge)
    runner.join(folder, asked(count, n), ranks, judge, FACTS)
    return generator


def test_more_samples_and_more_questions_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    assert len(_run(tmp_path, 3, 2).asked) == 6
    assert sorted(_run(tmp_path, 4, 3).asked) == [(0, 2), (1, 2), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert _run(tmp_path, 4, 3).asked == []
    folder = ResponseFolder(tmp_path, "model", "task")
    assert folder.is_finished(runner.pairs_of(questions(4), 3), questions(4))
    assert not folder.is_finished(runner.pairs_of(questions(4), 4), questions(4))


def test_known_answers_get_their_true_score(tmp_path: Path) -> None:
    _run(tmp_path, 5, 3)
    found = score(ResponseFolder(tmp_path, "model", "task").read())
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.negative_logprob == pytest.approx(1.5 / 2)
    assert found.pass_at == pytest.approx({1: 2 / 3, 2: 1.0, 3: 1.0})


def test_regrading_changes_verdicts_and_nothing_else(tmp_path: Path) -> None:
    _run(tmp_path, 3, 2)
    folder = ResponseFolder(tmp_path, "model", "task")
    before = list(folder.read())
    other = answered_by_none(3)
    runner.regrade(tmp_path, [(folder, other)], judge)
    after = list(folder.read())
    assert [record["correct"] for record in after] == [not record["correct"] for record in before]
    assert [(record["id"], record["sample"], record["text"]) for record in after] == [
        (record["id"], record["sample"], record["text"]) for record in before
    ]
    with pytest.raises(UserError, match="no question 'q1' any more"):
        runner.regrade(tmp_path, [(folder, [other[0], other[2]])], judge)
    assert list(folder.read()) == after


def answered_by_none(count: int) -> list[Question]:
    """The same questions, whose answer is now what odd samples say."""
    return [replace(question, entry={"answer": "none"}) for question in questions(count)]


def test_a_regrading_that_is_stopped_leaves_all_verdicts_as_they_were_or_ends_with_all_of_them_new(tmp_path: Path) -> None:
    folders = [ResponseFolder(tmp_path, "model", name) for name in ("first", "second")]
    for folder in folders:
        runner.draw(lambda: Scripted(text_of), folder, asked(3, 2), Ranks(tmp_path), judge)
        runner.join(folder, asked(3, 2), Ranks(tmp_path), judge, FACTS)
    before = [folder.finished.read_bytes() for folder in folders]

    def killed(pairs):
        if next(stopped) == 2:
            raise KeyboardInterrupt
        return judge(pairs)

    stopped, todo = iter((1, 2)), [(folder, answered_by_none(3)) for folder in folders]
    with pytest.raises(KeyboardInterrupt):
        runner.regrade(tmp_path, todo, killed)
    assert (tmp_path / runner.REGRADED / "responses" / "model" / "first.jsonl.zst").is_file()
    runner.settle_regrading(tmp_path)
    assert [folder.finished.read_bytes() for folder in folders] == before
    runner.regrade(tmp_path, todo, judge)
    after = [folder.finished.read_bytes() for folder in folders]
    folders[1].finished.write_bytes(before[1])  # as after a kill when one file of two had taken its place
    waiting = tmp_path / runner.REGRADED / "responses" / "model" / "second.jsonl.zst"
    waiting.parent.mkdir(parents=True)
    waiting.write_bytes(after[1])
    (tmp_path / runner.REGRADED / runner.ALL_WRITTEN).touch()
    runner.settle_regrading(tmp_path)
    assert [folder.finished.read_bytes() for folder in folders] == after
    assert not (tmp_path / runner.REGRADED).exists()
    assert all(record["correct"] == (record["sample"] % 2 == 1) for folder in folders for record in folder.read())


def test_verdicts_by_other_tests_limits_or_answers_are_made_again(tmp_path: Path) -> None:
    def packed(tests: str) -> PackedEntry:
        return PackedEntry({"time_limit": 6.0}, tests, "rows.jsonl:1")

    plain = {"tests": [{"input": "1", "output": "2"}], "time_limit": 6.0}
    entries = [plain, {**plain, "time_limit": 7.0}, {**plain, "tests": [{"input": "1", "output": "3"}]}, packed("a"), packed("b")]
    assert len({graded_as(replace(questions(1)[0], entry=entry)) for entry in entries}) == 5
    assert graded_as(replace(questions(1)[0], entry=dict(reversed(plain.items())))) == graded_as(replace(questions(1)[0], entry=plain))
    _run(tmp_path, 3, 2)
    folder, other = ResponseFolder(tmp_path, "model", "task"), answered_by_none(3)
    pairs = runner.pairs_of(other, 2)
    assert folder.is_finished(pairs, questions(3)) and not folder.is_finished(pairs, other)
    runner.draw(lambda: pytest.fail("nothing is to be drawn"), folder, replace(asked(3, 2), questions=tuple(other)), Ranks(tmp_path), judge)
    runner.join(folder, replace(asked(3, 2), questions=tuple(other)), Ranks(tmp_path), judge, FACTS)
    assert folder.is_finished(pairs, other)
    assert [record["correct"] for record in folder.read()] == [False, True] * 3


def test_a_grader_that_cannot_keep_up_holds_the_generation_back_and_that_is_counted(tmp_path: Path) -> None:
    graded: list[int] = []
    behind: list[int] = []

    def slow(pairs):
        for pair in pairs:
            time.sleep(0.02)
            graded.append(1)
            yield from judge([pair])

    log = ResponseFolder(tmp_path, "model", "task").open_part("verdicts", 0)
    with runner.Grading(slow, log, ahead=3) as grading:
        for number in range(20):
            grading.submit(questions(20)[number], 0, "Answer: 0")
            behind.append(number + 1 - len(graded))
        grading.finish()
    assert len(graded) == 20
    assert max(behind) <= 2 * 3 + 1  # what waits, and the batch at work
    assert grading.waited_seconds > 0.2


def test_an_error_ends_the_grading_without_working_through_what_waits(tmp_path: Path) -> None:
    folder = ResponseFolder(tmp_path, "model", "task")

    def slow(pairs):
        for pair in pairs:
            time.sleep(0.05)
            yield from judge([pair])

    with pytest.raises(OSError, match="no space"), runner.Grading(slow, folder.open_part("verdicts", 0)) as grading:
        for question in questions(200):
            grading.submit(question, 0, "Answer: 0")
        raise OSError("no space")
    assert len(list(records(folder.parts / "verdicts.0.jsonl.zst"))) < 20


def test_a_response_is_on_disk_before_the_next_one_is_drawn(tmp_path: Path) -> None:
    folder, ranks, seen = ResponseFolder(tmp_path, "model", "task"), Ranks(tmp_path), []

    def write(request):
        seen.append(len(folder.answered()))
        return "Answer: 0"

    runner.draw(lambda: Scripted(write), folder, asked(3, 2), ranks, judge)
    assert seen == list(range(6))


def test_what_stops_the_grading_stops_the_run_and_the_response_is_kept(tmp_path: Path) -> None:
    def broken(pairs):
        raise UserError("no grader today")

    for number, count in (("many", 30), ("the last one", 1)):
        folder, ranks = ResponseFolder(tmp_path / number, "model", "task"), Ranks(tmp_path / number)
        with pytest.raises(UserError, match="no grader today"):
            runner.draw(lambda: Scripted(text_of, seconds=0.01), folder, asked(count, 1), ranks, broken)
        assert folder.answered()
        assert ranks.rank not in folder.ended()


def test_grading_is_beside_generation_and_its_cost_is_measured(tmp_path: Path) -> None:
    """20 responses of 30 ms, gradings of 20 ms each."""

    def slow(pairs):
        for pair in pairs:
            time.sleep(0.02)
            yield from judge([pair])

    folder, ranks = ResponseFolder(tmp_path, "model", "task"), Ranks(tmp_path)
    runner.draw(lambda: Scripted(text_of, seconds=0.03), folder, asked(20, 1), ranks, slow)
    facts = folder.ended()[0]
    runner.join(folder, asked(20, 1), ranks, judge, FACTS)
    graded = sum(record["grading_seconds"] for record in folder.read())
    assert graded >= 0.4
    assert facts["grading_wait_seconds"] < graded / 2  # all of it, were it done afterwards


def test_a_question_that_reads_otherwise_now_is_refused_and_a_verdict_of_another_rule_is_made_again(tmp_path: Path) -> None:
    protocol = {"model": "a"}
    folder = ResponseFolder(tmp_path, "model", "task")
    folder.claim(protocol)
    runner.draw(lambda: Scripted(text_of), folder, asked(3, 2), Ranks(tmp_path, 0, 1, 1.0), judge)
    folder.claim(protocol, questions(5))
    edited = [replace(question, text="what is it?") if question.id == "q1" else question for question in questions(3)]
    with pytest.raises(UserError, match="question q1 was another"):
        folder.claim(protocol, edited)
    strict = tuple(replace(question, extraction="whole") for question in questions(3))
    assert len(folder.verdicts({each.id: each for each in questions(3)})) == 6
    assert folder.verdicts({each.id: each for each in strict}) == {}
    runner.join(folder, replace(asked(3, 2), questions=strict), Ranks(tmp_path, 0, 1, 1.0), judge, FACTS)
    assert [record["correct"] for record in folder.read()] == [False] * 6  # the whole text is never the number


def test_responses_that_were_drawn_otherwise_are_not_added_to(tmp_path: Path) -> None:
    folder = ResponseFolder(tmp_path, "model", "task")
    folder.claim({"model": "a", "sampling": {"temperature": 0.5}})
    folder.claim({"model": "a", "sampling": {"temperature": 0.6}})  # nothing was drawn yet
    with closing(folder.open_part("responses", 1)) as log:
        log.append({"id": "q", "sample": 0})
    folder.claim({"model": "a", "sampling": {"temperature": 0.6}})
    with pytest.raises(UserError, match=r"sampling was \{'temperature': 0.6\}, is now \{'temperature': 0.7\}"):
        folder.claim({"model": "a", "sampling": {"temperature": 0.7}})
