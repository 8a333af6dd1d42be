"""Programs as answers: run on every test in a sandbox, compared outside it, right when every test is.

Owns: reading a question's tests and limits, and running a checker where one test has many right outputs. Refuses: to let an expected output into the
program's sandbox (a checker, which needs it, has a sandbox of its own), and to call a program wrong that the machine had no time for: over the wall
limit it is wrong if a processor was idle meanwhile for as long as a test may compute, so that it slept; else there is no verdict.

The entry's keys:

tests          list of {"input", "output"}, both text.
function       its name, for code_function.
time_limit     CPU seconds of a test (default 6). memory_limit: bytes (default 2 GiB).
tolerance      see `compare`; default: numbers must be exact.
checker        a Python program called as `checker.py input.txt correct_output.txt solution_output.txt`, which accepts by ending in order with 1 as
               the last word that it printed: open-r1/codeforces' generated_checker.
prelude        text put before the program; `PRELUDE` has the imports that LeetCode's programs take for granted.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from megatron_prism.grading.compare import compare_output, compare_result, shorten
from megatron_prism.grading.question import Grade, Question
from megatron_prism.grading.sandbox import Limits, Outcome, Sandbox

PRELUDE = "\n".join(
    [
        "import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, statistics, string, sys",
        *(f"from {name} import *" for name in "bisect collections copy functools heapq itertools math operator random re string typing".split()),
        "from builtins import *",
        "",
    ]
)
FUTURE = re.compile(r"^from __future__ import [^\n(]*$", re.MULTILINE)
CHECKER_SECONDS = 30.0
CHECKER_FILES = ("input.txt", "correct_output.txt", "solution_output.txt")
FAILURES = {"runtime_error": "ended with an error", "time_limit": "over the time limit", "output_limit": "printed too much"}


def grade_stdin(question: Question, program: str) -> Grade:
    """The program reads standard input and prints."""
    entry = question.entry
    if entry.get("checker"):
        return _grade(entry, program, None, None)
    return _grade(entry, program, None, lambda outcome, test: compare_output(outcome.output, test["output"], entry.get("tolerance")))


def grade_function(question: Question, program: str) -> Grade:
    """The program defines a function (or a class Solution with it), which is called with the input's lines."""
    entry = question.entry
    return _grade(entry, program, entry["function"], lambda outcome, test: compare_result(outcome.result, test["output"], entry.get("tolerance")))


def _grade(entry: Mapping[str, Any], program: str, function: str | None, compare: Callable[[Outcome, Mapping[str, str]], str | None] | None) -> Grade:
    tests = entry["tests"]  # one look: an entry may unpack them at every look
    if not tests:
        raise ValueError("the question has no tests")
    limits = _limits(entry, tests)
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(_after(entry.get("prelude", ""), program), limits))
        if compare is None:
            checker = stack.enter_context(Sandbox(entry["checker"], Limits(CHECKER_SECONDS)))
        for number, test in enumerate(tests, 1):
            place = f"test {number} of {len(tests)}"
            outcome = sandbox.run(test["input"], function=function)
            if outcome.status == "wall_limit":
                said = f"{place}: {outcome.wall_seconds:.0f} s passed, of which {outcome.cpu_seconds:.1f} s on a processor"
                if outcome.spare_seconds >= limits.cpu_seconds:  # it had the time that it was given, and slept
                    return Grade(0.0, detail=f"{said}, and one was idle for {outcome.spare_seconds:.0f} s of them")
                return Grade(0.0, "timeout", said)
            if outcome.status != "ok":
                return Grade(0.0, detail=f"{place}: {FAILURES[outcome.status]}{_last_line(outcome.stderr)}")
            difference = compare(outcome, test) if compare else _check(checker, outcome, test)
            if difference is not None:
                return Grade(0.0, detail=f"{place}: {difference}")
    return Grade(1.0)


def _after(prelude: str, program: str) -> str:
    """The program behind a prelude; what Python wants first of all stays first."""
    futures = FUTURE.findall(program) if prelude else []
    return "\n".join([*futures, prelude + (FUTURE.sub("", program) if futures else program)])


def _limits(entry: Mapping[str, Any], tests: Sequence[Mapping[str, str]]) -> Limits:
    longest = max(len(test["output"]) for test in tests)
    defaults = Limits()
    return Limits(
        cpu_seconds=float(entry.get("time_limit") or defaults.cpu_seconds),
        memory_bytes=int(entry.get("memory_limit") or defaults.memory_bytes),
        output_bytes=max(defaults.output_bytes, 4 * longest),
    )


def _check(checker: Sandbox, outcome: Outcome, test: Mapping[str, str]) -> str | None:
    """None where the checker accepts. Errors: RuntimeError where it fails: then there is no verdict."""
    texts = (test["input"], test["output"], outcome.output)
    found = checker.run(arguments=CHECKER_FILES, files=dict(zip(CHECKER_FILES, texts, strict=True)))
    words = found.output.split()
    if found.status != "ok" or not words:
        raise RuntimeError(f"the checker: {found.status}, {_last_line(found.stderr) or 'it printed nothing'}")
    return None if words[-1] in ("1", "1.0") else f"the checker refuses {shorten(outcome.output.strip())}"


def _last_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return f" ({shorten(lines[-1])})" if lines else ""
