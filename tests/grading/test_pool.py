"""Many verdicts from worker processes: in order, the same as one by one, and whatever happens to a worker is said of its pair alone."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.grading import Pool, Question, verdict
from megatron_prism.grading import pool as pool_module
from megatron_prism.grading.sandbox import SandboxError

HALF = Question("?", "math", "", {"answer": r"\frac{1}{2}"}, "boxed")
EXACT = Question("?", "exact", "", {"answer": "a"}, "whole")
SUM = Question("?", "code_stdin", "", {"tests": [{"input": "1 2", "output": "3"}]}, "code_block")
CHOICE = Question("?", "choice", "", {"answer": "B", "choices": ["one", "two", "three"]}, "boxed_letter")
LOOP = Question("?", "math", "", {"answer": "7"}, "boxed")
ENDLESS = r"\boxed{9^{9^{9^9}}}"


def test_verdicts_come_in_order_and_equal_those_one_by_one() -> None:
    pairs = [
        (HALF, r"\boxed{0.5}"),
        (SUM, "```python\nprint(sum(map(int, input().split())))\n```"),
        (EXACT, "a"),
        (EXACT, ""),
        (CHOICE, r"\boxed{B}"),
        (CHOICE, r"\boxed{A}"),
        (HALF, r"\boxed{2}"),
        (CHOICE, r"\boxed{D}"),
        (SUM, "```\nprint(4)\n```"),
    ] * 2
    with Pool(2) as pool:
        found = list(pool.verdicts(iter(pairs)))
    assert found == [verdict(*pair) for pair in pairs]
    reasons = ["correct", "correct", "correct", "no_answer", "correct", "wrong", "wrong", "wrong", "wrong"]
    assert [one.reason for one in found] == reasons * 2


def test_a_process_with_more_than_1023_descriptors_grades() -> None:
    """select(2) refuses such descriptors; a trainer with many shards, sockets and memory maps has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with ExitStack() as many:
            while many.enter_context(Path(os.devnull).open()).fileno() < 1030:
                pass
            with Pool(1) as pool:
                found = list(pool.verdicts([(EXACT, "a"), (SUM, "```python\nprint(sum(map(int, input().split())))\n```")]))
        assert [one.reason for one in found] == ["correct", "correct"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_choice_among_letters_that_are_not_there_is_the_graders_failure() -> None:
    found = verdict(Question("?", "choice", "", {"answer": "B", "choices": ["one"]}, "boxed_letter"), r"\boxed{B}")
    assert found.reason == "grader_failed"
    assert "none of the letters A" in str(verdict(CHOICE, r"\boxed{D}").detail)


def test_an_endless_computation_is_a_timeout_of_its_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CPU_SECONDS", 1.0)
    with Pool(1) as pool:
        found = list(pool.verdicts([(HALF, r"\boxed{0.5}"), (LOOP, ENDLESS), (HALF, r"\boxed{0.5}")]))
    assert [one.reason for one in found] == ["correct", "timeout", "correct"]
    assert (found[1].answer, found[1].score) == ("9^{9^{9^9}}", 0.0)


def test_a_grader_that_sleeps_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(1) as pool:
        list(pool.verdicts([(EXACT, "a")]))
        worker = pool._workers[0]
        worker.process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(pool_module, "WALL_PER_CPU", 0.01)
        [found] = pool.verdicts([(EXACT, "a")])
        assert found.reason == "timeout"
        monkeypatch.undo()
        assert [one.reason for one in pool.verdicts([(EXACT, "a")])] == ["correct"]


def test_a_worker_that_dies_is_replaced_and_its_pair_says_so() -> None:
    with Pool(1) as pool:
        list(pool.verdicts([(EXACT, "a")]))
        pool._workers[0].process.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, pool._workers[0].process.kill).start()
        found = list(pool.verdicts([(EXACT, "a"), (EXACT, "a")]))
        assert [one.reason for one in found] == ["grader_failed", "correct"]
        assert "-9" in str(found[0].detail)


def test_a_worker_that_died_idle_costs_no_pair() -> None:
    with Pool(1) as pool:
        list(pool.verdicts([(EXACT, "a")]))
        pool._workers[0].process.kill()
        pool._workers[0].process.wait()
        assert [one.reason for one in pool.verdicts([(EXACT, "a"), (EXACT, "b")])] == ["correct", "wrong"]


def test_workers_that_cannot_start_are_an_error_and_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pool(1) as pool, pytest.raises(SandboxError, match="did not start"):
        list(pool.verdicts([(EXACT, "a")]))


def test_bad_questions_and_missing_packages_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(1) as pool:
        with pytest.raises(UserError, match="no grader 'vibes'"):
            list(pool.verdicts([(EXACT, "a"), (Question("?", "vibes", "", {}), "a")]))
        assert [one.reason for one in pool.verdicts([(EXACT, "a")])] == ["correct"]
    graders = sys.modules["megatron_prism.grading.graders"]
    monkeypatch.setattr(graders, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"pip install 'megatron-prism\[eval\]'"):
        verdict(HALF, r"\boxed{0.5}")


def test_what_a_worker_refuses_reaches_the_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.platform = 'darwin'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Pool(1) as pool, pytest.raises(UserError, match="Linux alone"):
        list(pool.verdicts([(SUM, "```\nprint(3)\n```")]))


def test_stopping_early_leaves_a_pool_that_works() -> None:
    with Pool(2) as pool:
        with closing(pool.verdicts((EXACT, str(i)) for i in range(10_000))) as verdicts:
            assert next(verdicts).reason == "wrong"
        assert [one.reason for one in pool.verdicts([(EXACT, "a")])] == ["correct"]


def test_pairs_are_read_no_further_than_needed() -> None:
    pairs = iter([(EXACT, "a")] * 10_000)
    with Pool(1) as pool, closing(pool.verdicts(pairs)) as verdicts:
        next(verdicts)
        assert len(list(pairs)) >= 10_000 - pool_module.PAIRS_AHEAD - 1


def test_maths_is_graded_off_the_main_thread_and_leaves_our_alarm_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(verdict(HALF, r"\boxed{0.5}").reason))
    thread.start()
    thread.join()
    assert found == ["correct"]
    assert signal.getsignal(signal.SIGALRM) is before


def test_workers_end_with_their_process_even_in_an_endless_computation() -> None:
    script = f"""
from megatron_prism.grading import Pool, Question, pool
pool.CPU_SECONDS = 3
p = Pool(1)
question = Question("?", "math", "", {{"answer": "7"}}, "boxed")
list(p.verdicts([(question, r"\\boxed{{7}}")]))
print(p._workers[0].process.pid, flush=True)
list(p.verdicts([(question, r"{ENDLESS}")]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    time.sleep(0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{worker}").exists() and _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_running(worker)


def test_a_signal_to_the_whole_group_leaves_its_pair_graded() -> None:
    """torchrun asks a run to save and stop by a SIGTERM to each rank's group: the step that it saves must have its gradings."""
    script = f"""
import os, signal, threading
from megatron_prism.grading import Pool, Question
signal.signal(signal.SIGTERM, lambda *_: None)
program = "```python\\nimport time\\ntime.sleep(2)\\nprint(3)\\n```"
question = Question("?", "code_stdin", "", {{"tests": [{{"input": "1 2", "output": "3"}}]}}, "code_block")
with Pool(1) as pool:
    list(pool.verdicts([({EXACT!r}, "a")]))
    threading.Timer(0.7, lambda: os.killpg(0, signal.SIGTERM)).start()
    print([one.reason for one in pool.verdicts([(question, program)])])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, start_new_session=True, check=False)
    assert done.stdout.strip() == "['correct']", done.stdout + done.stderr


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
