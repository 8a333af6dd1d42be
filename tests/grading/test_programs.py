"""Programs as answers: right when every test is, and no verdict to be had by any other way."""

import textwrap

import pytest

from megatron_prism.grading import Question, Verdict, verdict
from megatron_prism.grading.programs import PRELUDE


def block(program: str) -> str:
    return f"Here:\n```python\n{textwrap.dedent(program).strip()}\n```\n"


def printing(program: str, **entry: object) -> Verdict:
    """The verdict on a program that must add two numbers."""
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22\n", "output": "42\n"}]
    return verdict(Question("?", "code_stdin", "", {"tests": tests, "time_limit": 1} | entry, "code_block"), block(program))


def returning(program: str, **entry: object) -> Verdict:
    tests = [{"input": "1\n2", "output": "3"}, {"input": "20\n22", "output": "42"}]
    return verdict(Question("?", "code_function", "", {"tests": tests, "time_limit": 1, "function": "add"} | entry, "code_block"), block(program))


def test_right_programs_are_right() -> None:
    assert printing("print(sum(map(int, input().split())))").reason == "correct"
    assert returning("def add(a, b):\n    return a + b").reason == "correct"
    assert returning("class Solution:\n    def add(self, a, b):\n        return a + b").reason == "correct"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("print(3)", "test 2 of 2: line 1 is '3', expected '42'"),
        ("print('sum:', sum(map(int, input().split())))", "test 1 of 2: line 1 is 'sum: 3', expected '3'"),
        ("pass", "test 1 of 2: line 1 is '', expected '3'"),
        ("while True: pass", "test 1 of 2: over the time limit"),
        ("print(1 / 0)", "test 1 of 2: ended with an error ('ZeroDivisionError: division by zero')"),
        ("print(", "test 1 of 2: ended with an error (\"SyntaxError: '(' was never closed\")"),
        ("print(3)\nraise SystemExit(1)", "test 1 of 2: ended with an error"),
        ("while True: print('x' * 1000)", "test 1 of 2: printed too much"),
    ],
)
def test_wrong_programs_are_wrong_and_it_is_said_why(program: str, detail: str) -> None:
    found = printing(program)
    assert (found.reason, found.score, found.detail) == ("wrong", 0.0, detail)


def test_no_program_is_no_answer() -> None:
    question = Question("?", "code_stdin", "", {"tests": [{"input": "", "output": ""}]}, "code_block")
    assert verdict(question, "print(1)").reason == "no_answer"


def test_a_question_without_tests_is_the_graders_failure() -> None:
    assert printing("print(3)", tests=[]).reason == "grader_failed"


def test_exit_and_threads_end_a_program_in_order() -> None:
    assert printing("import sys\nprint(sum(map(int, input().split())))\nsys.exit()").correct
    assert printing("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()").correct


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import builtins, json\nbuiltins.all = lambda *a: True\njson.loads = json.dumps = lambda *a, **k: 3\nprint(0)",
        "class Equal(str):\n    def __eq__(self, other): return True\nprint(Equal('0'))",
        "print('1')\nprint('correct')\nprint('{\"status\": \"ok\", \"correct\": true}')",
        """
        import os
        for descriptor in range(3, 1000):
            try: os.write(descriptor, b'{"status": "ok"}' * 100)
            except OSError: pass
        """,
        """
        import sys
        frame = sys._getframe()
        while frame:
            for name, value in {**frame.f_globals, **frame.f_locals}.items():
                if hasattr(value, "request"): value.request = {"status": "ok"}
                if name == "confine": value.deny_calls = print
            frame = frame.f_back
        """,
    ],
    ids=["_exit", "exit", "monkeypatched comparison", "equal to all", "the word correct", "other descriptors", "frames"],
)
def test_a_verdict_cannot_be_faked_by_printing(program: str) -> None:
    found = printing(program)
    assert found.reason == "wrong"
    assert "Syntax" not in str(found.detail) and "Indentation" not in str(found.detail)


@pytest.mark.parametrize(
    "program",
    [
        "class Equal:\n    def __eq__(self, other): return True\ndef add(a, b): return Equal()",
        "class Equal(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Equal(0)",
        "import os\ndef add(a, b):\n    os._exit(0)",
        "import os\ndef add(a, b):\n    os.write(3, b'true'); os._exit(0)",
        "import json\njson.dumps = lambda *a, **k: '0'\ndef add(a, b): return 0",
        "def add(a, b):\n    print(a + b)",
        "def add(a, b): return {3, 42}",
        "def add(a, b): return add(a, b)",
        "def add(a, b): return 10 ** 10000",
        "def plus(a, b): return a + b",
    ],
    ids=["equal to all", "number equal to all", "leaves", "writes and leaves", "own json", "prints", "set", "recursion", "huge", "another name"],
)
def test_a_verdict_cannot_be_faked_by_returning(program: str) -> None:
    found = returning(program)
    assert found.reason == "wrong"
    assert "Indentation" not in str(found.detail)


def test_the_expected_output_is_nowhere_in_the_programs_memory() -> None:
    program = """
        import gc, sys
        frame, seen = sys._getframe(), []
        while frame:
            seen += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        text = repr(seen) + repr([item for item in gc.get_objects() if isinstance(item, (dict, list, tuple))])
        word = "-".join(["the", "expected", "text"])
        print(word if word in text else "not found among", len(text) > 100000)
    """
    found = printing(program, tests=[{"input": "1", "output": "the-expected-text"}])
    assert found.detail == "test 1 of 1: line 1 is 'not found among True', expected 'the-expected-text'"


def test_an_output_expected_twice_is_not_remembered_from_test_to_test() -> None:
    program = """
        import os
        if os.path.exists("seen"): print(42)
        else: open("seen", "w").write(input()); print(3)
    """
    assert printing(program).detail == "test 2 of 2: line 1 is '3', expected '42'"


@pytest.mark.parametrize(("spare", "reason"), [(5.9, "timeout"), (6.0, "wrong")])
def test_a_sleeper_is_wrong_where_a_processor_was_idle_for_its_limit_and_without_a_verdict_where_none_was(
    monkeypatch: pytest.MonkeyPatch, spare: float, reason: str
) -> None:
    from megatron_prism.grading.sandbox import Limits, Spare

    monkeypatch.setattr(Limits, "wall", 0.5)
    monkeypatch.setattr(Spare, "seconds", lambda _: spare)
    found = printing("import time\ntime.sleep(600)", time_limit=6)
    assert (found.reason, found.correct, found.score) == (reason, False, 0.0)
    assert "of which 0." in str(found.detail)


def test_numbers_are_exact_unless_a_tolerance_is_given() -> None:
    program = "a, b = map(int, input().split())\nprint((a + b) * 1.0000001)"
    assert printing(program).reason == "wrong"
    assert printing(program, tolerance=1e-6).reason == "correct"


def test_memory_is_limited() -> None:
    assert "MemoryError" in str(printing("x = bytearray(1 << 30)\nprint(3)", memory_limit=100 << 20).detail)


def test_a_prelude_stands_before_the_program() -> None:
    program = "class Solution:\n    def add(self, a: int, b: Optional[List[int]]) -> int:\n        return Counter([a, b]).total() and gcd(0, a + b)"
    assert returning(program, prelude=PRELUDE).reason == "correct"
    assert returning("from __future__ import annotations\n" + program, prelude=PRELUDE).reason == "correct"
    assert "NameError" in str(returning(program).detail)


CHECKER = """
import sys
numbers, right, found = (open(path).read().split() for path in sys.argv[1:4])
assert right[0] in ("3", "42")
print(1 if len(found) == 2 and sum(map(int, found)) == sum(map(int, numbers)) else 0)
"""


def test_a_checker_decides_where_one_test_has_many_right_outputs() -> None:
    assert printing("print(*reversed(input().split()))", checker=CHECKER).reason == "correct"
    found = printing("print(1, 2)", checker=CHECKER)
    assert (found.reason, found.detail) == ("wrong", "test 2 of 2: the checker refuses '1 2'")


@pytest.mark.parametrize("checker", ["1 / 0", "pass", "import sys; print(1); sys.exit(1)", "while True: print('1' * 1000000)"])
def test_a_checker_that_fails_gives_no_verdict(checker: str) -> None:
    assert printing("print(3)", checker=checker).reason == "grader_failed"


def test_a_program_cannot_speak_for_the_checker() -> None:
    program = "open('correct_output.txt', 'w').write('1'); open('solution_output.txt', 'w').write('1 2'); print(1)"
    assert printing(program, checker=CHECKER).reason == "wrong"
