"""What hostile programs cannot do. Each is run for real; limits are processor time, so that a loaded machine changes nothing."""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_programs
import pytest
from hostile_programs import LIMITS

from megatron_prism.errors import UserError
from megatron_prism.grading import sandbox
from megatron_prism.grading.sandbox import Limits, Outcome, Sandbox, SandboxError
from megatron_prism.temporary import clear


def run(program: str, stdin: str = "", limits: Limits = LIMITS, **settings: Any) -> Outcome:
    with Sandbox(textwrap.dedent(program), limits) as box:
        return box.run(stdin, **settings)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the grader's own, to be killed."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_what_protects_is_said() -> None:
    protections = sandbox.describe()
    assert set(protections) >= {"namespaces", "privileges", "files", "calls"}
    assert "seccomp" in protections["calls"]


def test_a_program_reads_and_prints_as_it_would_outside() -> None:
    program = """
        import sys, threading
        n = int(input())
        rest = sys.stdin.read().split()
        thread = threading.Thread(target=lambda: print(n, rest, sys.argv[1:], __name__))
        thread.start()
        if __name__ == "__main__":
            exit()
    """
    outcome = run(program, "3\n1 ä\n", arguments=["a"])
    assert (outcome.status, outcome.output, outcome.exit_code) == ("ok", "3 ['1', 'ä'] ['a'] __main__\n", 0)


@pytest.mark.parametrize("source", ["open(0).read()", "__import__('sys').stdin.buffer.read().decode()", "open('/dev/stdin').read()"])
def test_standard_input_is_found_where_programs_look(source: str) -> None:
    if "dev" in source and sandbox.describe()["root"].startswith("off"):
        pytest.skip("no root folder of its own here")
    assert run(f"print({source}[::-1])", "abc").output == "cba\n"


def test_what_honest_programs_do_works() -> None:
    program = """
        import asyncio, sys, tempfile, threading
        import numpy
        sys.setrecursionlimit(10 ** 6)
        def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
        async def seven(): return 7
        threading.stack_size(32 << 20)
        thread = threading.Thread(target=lambda: print(depth(50_000)))
        thread.start()
        thread.join()
        with tempfile.TemporaryFile() as file: print(file.write(b"four"))
        print(asyncio.run(seven()), numpy.eye(3).sum(), depth(50_000))
    """
    outcome = run(program, limits=Limits(cpu_seconds=20))
    assert (outcome.status, outcome.output) == ("ok", "50000\n4\n7 3.0 50000\n"), outcome.stderr


@pytest.mark.parametrize(
    ("program", "exit_code", "word"),
    [
        ("1 / 0", 1, "ZeroDivisionError"),
        ("x = (", 1, "SyntaxError"),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("\0", 1, "null"),
    ],
)
def test_errors_are_errors(program: str, exit_code: int, word: str) -> None:
    outcome = run(program)
    assert (outcome.status, outcome.exit_code) == ("runtime_error", exit_code)
    assert word in outcome.stderr


def test_runs_do_not_know_of_each_other() -> None:
    with Sandbox("import os; print(os.listdir('.')); open('left', 'w').write('x'); os.mkdir('d'); open('d/e', 'w')", LIMITS) as box:
        assert [box.run().output for _ in range(3)] == ["[]\n"] * 3


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *a: None)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "from signal import *\nsignal(SIGXCPU, SIG_IGN)\nsignal(SIGALRM, lambda *a: None)\nsetitimer(ITIMER_REAL, .01, .01)\nwhile True: pass",
        "import threading\ndef spin():\n    while True: pass\nfor _ in range(4): threading.Thread(target=spin).start()",
        "7 ** 7 ** 7 ** 7",
    ],
    ids=["loop", "signal handlers", "alarms", "threads", "huge power"],
)
def test_an_endless_loop_ends(program: str) -> None:
    outcome = run(program, limits=Limits(cpu_seconds=0.5))
    assert outcome.status == "time_limit"
    assert outcome.cpu_seconds < 3


def test_a_sleeper_ends_and_is_no_time_limit_of_its_own() -> None:
    outcome = run("import time; time.sleep(600)", limits=Limits(cpu_seconds=1, wall_seconds=0.5))
    assert outcome.status == "wall_limit"


@pytest.mark.parametrize("program", ["while True: print('x' * 1000)", "import os\nwhile True: os.write(1, b'x' * 100000)"])
def test_endless_output_ends(program: str) -> None:
    outcome = run(program)
    assert outcome.status == "output_limit"
    assert len(outcome.output) <= LIMITS.output_bytes


def test_endless_errors_are_cut() -> None:
    outcome = run("import sys\nfor _ in range(100000): print('x' * 100, file=sys.stderr)\nprint('done')")
    assert (outcome.status, outcome.output) == ("ok", "done\n")
    assert len(outcome.stderr) <= 5000


def test_a_memory_bomb_is_an_error_of_the_program() -> None:
    outcome = run("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert outcome.status == "runtime_error"
    assert "MemoryError" in outcome.stderr
    assert outcome.peak_bytes < 600 << 20


def test_a_fork_bomb_is_an_error_of_the_program() -> None:
    outcome = run("import os\nwhile True: os.fork()")
    assert outcome.status == "runtime_error"
    assert "PermissionError" in outcome.stderr


def test_hostile_programs_are_stopped_here(bystander: subprocess.Popen[bytes]) -> None:
    assert hostile_programs.run_all() == {}
    assert bystander.poll() is None


def test_threads_are_counted() -> None:
    program = """
        import threading, time
        threading.stack_size(65536)
        for _ in range(5000): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    """
    if sandbox.describe()["root"].startswith("off"):
        pytest.skip("threads are limited by memory alone here")
    assert "can't start new thread" in run(program).stderr


def test_leaving_early_is_no_result() -> None:
    outcome = run("import os\ndef f(): os._exit(0)", function="f")
    assert (outcome.status, outcome.result) == ("ok", "")


def test_a_function_returns_through_its_own_channel() -> None:
    program = "print('[1, 99]')\nclass Solution:\n    def f(self, a, b):\n        print('noise')\n        return (a, [b, {'k': None}])"
    outcome = run(program, '1\n"x"', function="f")
    assert json.loads(outcome.result) == [1, ["x", {"k": None}]]
    assert outcome.output == "[1, 99]\nnoise\n"


@pytest.mark.parametrize(
    "body",
    ["return {1, 2}", "return object()", "return 10 ** 5000", "return f()", "x = []\n    x.append(x)\n    return x"],
    ids=["set", "object", "huge integer", "recursion", "cycle"],
)
def test_what_cannot_be_returned_is_an_error_of_the_program(body: str) -> None:
    outcome = run(f"def f():\n    {body}", function="f")
    assert (outcome.status, outcome.result) == ("runtime_error", "")


def test_a_folder_that_cannot_be_cleared_costs_a_new_sandbox() -> None:
    program = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nprint('deep')"
    with Sandbox(program, LIMITS) as box:
        assert box.run().output == box.run().output == "deep\n"


def test_nothing_outlives_the_sandbox() -> None:
    with Sandbox("print(1)", LIMITS) as box:
        box.run()
        folder = box._folder and box._folder.path
        assert folder is not None and folder.exists()
        assert box._process is not None
        pids = [box._process.pid, *_tree(box._process.pid)]
    deadline = time.monotonic() + 60
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)
    assert not folder.exists()


def test_everything_ends_when_the_grader_is_killed() -> None:
    start = "from megatron_prism.grading.sandbox import *\nbox = Sandbox('while True: pass', Limits(cpu_seconds=1000))"
    script = f"{start}\nbox._started()\nprint(1, flush=True)\nbox.run()"
    grader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert grader.stdout is not None and grader.stdout.readline() == b"1\n"
    deadline = time.monotonic() + 60
    while len(pids := _tree(grader.pid)) < (4 if sandbox.describe()["namespaces"].startswith("own") else 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    grader.stdout.close()
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline + 60:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


def _tree(parent: int) -> list[int]:
    """All descendants."""
    children = [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [*children, *(pid for child in children for pid in _tree(child))]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_refused_to_run_unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="Linux alone"):
        Sandbox("")


def filtered(*numbers: int) -> str:
    """Code after which these system calls of x86_64 fail, as they do in containers."""
    lines = [line for number in numbers for line in ((0x15, 0, 1, number), (6, 0, 0, 0x50001))]
    return f"confine.filter_calls({[(0x20, 0, 0, 0), *lines, (6, 0, 0, 0x7FFF0000)]})"


UNSHARE, CREATE_RULESET = 272, 444
PLACES = {
    "another user": (
        "os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)",
        {"namespaces": "own", "files": "Landlock", "calls": "seccomp"},
    ),
    "Landlock alone": (filtered(UNSHARE), {"namespaces": "off", "root": "off", "files": "Landlock", "calls": "seccomp"}),
    "namespaces alone": (filtered(CREATE_RULESET), {"namespaces": "own", "root": "own", "files": "off", "calls": "seccomp"}),
}
"""How to get there, and how the protections begin."""


def _in_place(change: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that the change has confined, with a Python that others than its owner can read."""
    python = "/usr/bin/python3" if "setresuid" in change else sys.executable
    root = Path(__file__).parents[2]
    start = f"import os; from megatron_prism.grading.sandbox import confine; {change}; {code}"
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([python, "-P", "-c", start], capture_output=True, text=True, timeout=250, env=environment)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the places are made with numbers of x86_64")
@pytest.mark.parametrize("place", PLACES)
def test_hostile_programs_are_stopped_in_other_places(place: str) -> None:
    change, protections = PLACES[place]
    if "setresuid" in change and (os.getuid() != 0 or not _has_new_python("/usr/bin/python3")):
        pytest.skip("needs root and a Python 3.11 of the system")
    found = _in_place(
        change, "import hostile_programs; from megatron_prism.grading import sandbox; print([dict(sandbox.describe()), hostile_programs.run_all()])"
    )
    assert found.returncode == 0, found.stderr
    described, different = ast.literal_eval(found.stdout)
    assert {name: described[name].split()[0].rstrip(":") for name in protections} == protections
    assert different == {}


def _has_new_python(path: str) -> bool:
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    return Path(path).exists() and subprocess.run([path, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the places are made with numbers of x86_64")
def test_a_place_without_protection_is_refused_unless_told() -> None:
    nothing = filtered(UNSHARE, CREATE_RULESET)
    refused = _in_place(nothing, "from megatron_prism.grading import sandbox; sandbox.describe()")
    assert "UserError: graded programs would run unprotected here: neither a root folder of its own nor Landlock" in refused.stderr
    told = "os.environ['PRISM_SANDBOX'] = 'unprotected'; from megatron_prism.grading import sandbox; print(sandbox.describe()['files'])"
    assert _in_place(nothing, told).stdout.startswith("off")


def test_a_broken_sandbox_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SandboxError), Sandbox("print(1)") as box:
        box.run()


def test_a_grader_that_is_killed_leaves_a_folder_that_the_next_one_clears_away(tmp_path: Path) -> None:
    script = "from megatron_prism.grading.sandbox import Sandbox; box = Sandbox('print(1)'); box.run(); print(box._folder.path, flush=True); input()"
    grader = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert grader.stdout is not None
    folder = Path(grader.stdout.readline().strip())
    clear("program", tmp_path)
    assert folder.is_dir()
    grader.kill()
    grader.wait()
    clear("program", tmp_path)
    assert list(tmp_path.iterdir()) == []
