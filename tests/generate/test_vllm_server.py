"""A server process is started, watched, started again and ended, with all its children; failures say what to do.

The server here is fake_vllm.py, so that this takes seconds; test_backends.py runs the same things with vLLM itself.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import alive, stand_in
from tiny_hf import make_tiny_tokenizer

from megatron_prism import generate
from megatron_prism.errors import MachineError, UserError
from megatron_prism.generate import Request, Sampling, vllm_server
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.generate.vllm_backend import VllmGenerator
from megatron_prism.generate.vllm_server import PYTHON
from megatron_prism.temporary import clear

REQUESTS = [Request((place % 200 + 1,), place) for place in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose weights nobody reads, and the fake in place of vLLM's Python."""
    monkeypatch.setenv(PYTHON, str(stand_in(tmp_path)))
    model = make_tiny_tokenizer(tmp_path / "model")
    (model / "config.json").write_text('{"max_position_embeddings": 64, "eos_token_id": 0}')
    return model


def open_fake(folder: Path, **settings: object) -> VllmGenerator:
    found = generate.load(folder, "vllm", **{"batch_size": 4, **settings})
    assert isinstance(found, VllmGenerator)
    return found


def complete(generator: VllmGenerator) -> dict[int, tuple[int, ...]]:
    done: dict[int, tuple[int, ...]] = {}
    generator.generate_requests(REQUESTS, Sampling(max_new_tokens=5), lambda request, found: done.update({request.place: found.tokens}))
    return done


def expected() -> dict[int, tuple[int, ...]]:
    return {request.place: tuple(range(request.prompt[0] + 1, request.prompt[0] + 6)) for request in REQUESTS}


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_every_request_is_answered_by_any_number_of_servers(folder: Path) -> None:
    for servers in (1, 3):
        with open_fake(folder, servers=servers) as generator:
            assert complete(generator) == expected()


def test_a_server_that_dies_is_started_again_and_nothing_is_lost(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9,25")
    with open_fake(folder, max_restarts=2) as generator:
        assert complete(generator) == expected()
        assert generator.servers[0].starts == 3


def test_a_server_that_hangs_is_noticed_and_started_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9")
    monkeypatch.setenv("FAKE_SIGNAL", "SIGSTOP")
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 3.0)
    with open_fake(folder) as generator:
        assert complete(generator) == expected()
        assert generator.servers[0].starts == 2


def test_an_engine_that_hangs_behind_a_healthy_server_is_noticed_and_slow_work_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 2.0)
    monkeypatch.setenv("FAKE_SECONDS", "5")  # longer than stall_seconds, and two looks; but tokens are written
    with open_fake(folder, stall_seconds=1, batch_size=64) as generator:
        assert complete(generator) == expected()
        assert generator.servers[0].starts == 1
    monkeypatch.setenv("FAKE_SECONDS", "0")
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9")
    monkeypatch.setenv("FAKE_SIGNAL", "ENGINE")
    with open_fake(folder, stall_seconds=1) as generator:
        assert complete(generator) == expected()
        assert generator.servers[0].starts == 2


def test_a_server_without_work_may_stand_still(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_fake(folder, stall_seconds=1) as generator:
        (server,) = generator.servers
        for _ in range(4):
            server.check()
            time.sleep(0.5)
        assert server._still is None and "has written nothing" not in caplog.text
        server._still = (['vllm:generation_tokens_total{engine="0"} 0.0'], time.monotonic() - 3600)  # of a call that was given up
        assert complete(generator) == expected() and server.starts == 1


def test_reloading_asks_every_server_and_a_new_start_reads_the_new_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    other = tmp_path / "other"
    with open_fake(folder, servers=2) as generator:
        generator.reload(other)
        lines = (tmp_path / "calls").read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"] * 2
        assert all(str(other) in line and "reload_weights" in line for line in lines[1::4])
        assert all(f"--model={other}" in server._arguments() for server in generator.servers)


def test_a_server_that_keeps_dying_is_given_up_with_its_log(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9,20,21,22,23,24,25,26,27,28")
    log = tmp_path / "logs"
    words = rf"failed 2 times \(max_restarts=1\) with no work done in between.*{log}"
    with open_fake(folder, max_restarts=1, log=str(log)) as generator, pytest.raises(MachineError, match=words):
        complete(generator)


def test_a_server_that_dies_now_and_then_is_started_again_for_ever(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a run's weeks: one loss in each call, and one start again allowed."""
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9")
    with open_fake(folder, max_restarts=1) as generator:
        for starts in (2, 3, 4):
            assert complete(generator) == expected()
            assert generator.servers[0].starts == starts
            (tmp_path / "count").unlink()


def test_a_start_that_fails_is_bad_input_where_vllm_says_so_of_a_server_that_never_came_up(folder: Path, tmp_path: Path, monkeypatch) -> None:
    told = {
        "api_server.py: error: unrecognized arguments: --enforce-eagre": UserError,
        "ValueError: Free memory on device (3/80 GiB) on startup is less than desired GPU memory utilization (0.9, 72 GiB)": MachineError,
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": MachineError,
        "OSError: [Errno 116] Stale file handle": MachineError,
    }
    for log, kind in told.items():
        monkeypatch.setenv("FAKE_LOG", log)
        with pytest.raises(UserError, match="did not start") as raised:
            open_fake(folder)
        assert type(raised.value) is kind, log
    monkeypatch.delenv("FAKE_LOG")
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "9")
    with open_fake(folder) as generator:
        monkeypatch.setenv("FAKE_LOG", next(iter(told)))
        with pytest.raises(MachineError, match="did not start"):
            complete(generator)


def test_a_server_that_is_not_up_in_time_may_be_at_the_next_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    server = vllm_server.Server(folder, BackendConfig(backend="vllm", start_timeout_seconds=1), 64)
    server.python = sleeper
    server.start()
    with pytest.raises(MachineError, match="does not answer after start_timeout_seconds=1"):
        server.wait_ready()
    server.close()


EPILOG = Path(__file__).parents[2] / "docs" / "generate.md"


def test_the_epilog_of_the_documentation_clears_what_a_killed_generator_left_and_no_living_ones(tmp_path: Path) -> None:
    (line,) = (line for line in EPILOG.read_text().splitlines() if line.startswith("find /dev/shm "))
    owner = "import sys; from pathlib import Path; from megatron_prism.temporary import TemporaryFolder as T; t = T('new-weights', Path(sys.argv[1]))"
    code = f"{owner}; (t.path / 'model.safetensors').write_text('x'); print(t.path, flush=True); input()"
    owners = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in owners if process.stdout is not None)
    (tmp_path / "prism-other").mkdir()
    owners[0].kill()
    owners[0].wait()
    environment = {**os.environ, "SLURM_JOB_USER": str(os.getuid())}
    subprocess.run(line.replace("/dev/shm", str(tmp_path)), shell=True, check=True, env=environment)
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "prism-other"} and (living / "model.safetensors").is_file()
    assert not killed.exists()
    owners[1].communicate("\n", timeout=60)


def test_a_start_says_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vllm_server, "NEWS_SECONDS", 0.0)
    with open_fake(folder):
        said = capfd.readouterr().err
    assert "vllm server 0: starting; its log: /" in said and "starting for 0 s" in said and "ready after" in said


def test_closing_ends_the_server_and_its_children(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    with open_fake(folder, servers=2) as generator:
        homes = [server.home for server in generator.servers]
        assert len(alive(tmp_path / "pids")) == 4
    assert alive(tmp_path / "pids") == []
    assert not any(home.exists() for home in homes)
    generator.close()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Processes that `Server.start` makes from now on; each takes a second to come into being. All end with the test."""
    made: list[Any] = []
    right = subprocess.Popen
    monkeypatch.setattr(vllm_server, "subprocess", SlowSubprocess(made, right))
    yield made
    for process in made:
        process.stdin.close()
        process.wait(30)


class SlowSubprocess:
    """subprocess, for one module. begun: a process is being made."""

    def __init__(self, made: list[Any], right: Any) -> None:
        self.made, self.right, self.begun = made, right, threading.Event()
        self.PIPE, self.run = subprocess.PIPE, subprocess.run

    def Popen(self, *arguments: Any, **settings: Any) -> Any:  # noqa: N802  its name there
        self.begun.set()
        time.sleep(1)
        self.made.append(self.right(*arguments, **settings))
        return self.made[-1]


def asking(generator: VllmGenerator) -> threading.Thread:
    """A thread that asks for completions, whatever becomes of them."""

    def ask() -> None:
        with suppress(vllm_server.LostError):
            complete(generator)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_closing_while_another_thread_starts_the_server_again_leaves_none_behind(folder: Path, tmp_path: Path, starts: list[Any]) -> None:
    """As an error of the trainer does while responses are written beside it: the new process comes into being while close() ends the old one."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")  # as vLLM it says nothing for long
    sleeper.chmod(0o755)
    generator = open_fake(folder, log=str(tmp_path / "logs"))
    (server,) = generator.servers
    server.python = sleeper
    starting: Any = vllm_server.subprocess
    starting.begun.clear()
    assert server.process is not None
    server.process.kill()
    thread = asking(generator)
    assert starting.begun.wait(20)
    began = time.monotonic()
    generator.close()
    assert time.monotonic() - began < 15, "a start is given up, not waited for"
    thread.join(20)
    assert not thread.is_alive() and len(starts) == 2, "the one that was opened, and the one that was being made"
    assert all(process.poll() is not None for process in starts)


def test_a_closed_server_is_not_started_again(folder: Path, starts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The old process takes its time to end, and close() comes meanwhile."""
    generator = open_fake(folder)
    (server,) = generator.servers
    ended, right = threading.Event(), server._end

    def slow() -> None:
        right()
        ended.set()
        until(lambda: server.closing, 20)

    monkeypatch.setattr(server, "_end", slow)
    assert server.process is not None
    server.process.kill()
    thread = asking(generator)
    assert ended.wait(20)
    generator.close()
    thread.join(20)
    assert not thread.is_alive() and len(starts) == 1


def test_closing_does_not_wait_for_what_hangs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    generator = open_fake(folder)
    (server,) = generator.servers
    os.kill(int((tmp_path / "pids").read_text().split()[0]), signal.SIGSTOP)
    looking = threading.Thread(target=server.check, daemon=True)
    looking.start()
    assert until(lambda: bool(server._sockets))
    began = time.monotonic()
    generator.close()
    assert time.monotonic() - began < vllm_server.HEALTH_SECONDS / 2
    assert alive(tmp_path / "pids") == []


def test_a_killed_parent_leaves_no_server_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    opened = f"generator = generate.load({str(folder)!r}, 'vllm')"
    code = f"from megatron_prism import generate; {opened}; print(generator.servers[0].home, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    home = Path(parent.stdout.readline().strip())
    assert len(alive(tmp_path / "pids")) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert until(lambda: alive(tmp_path / "pids") == [])
    assert home.name.startswith("prism-vllm-server-") and home.is_dir()
    clear("vllm-server", home.parent)
    assert not home.exists()


def test_an_error_in_the_callers_hands_hangs_up_and_the_next_call_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.05")

    def full(request: Request, found: object) -> None:
        raise OSError("no space left")

    with open_fake(folder) as generator:
        with pytest.raises(OSError, match="no space left"):
            generator.generate_requests(REQUESTS, Sampling(max_new_tokens=5), full)
        assert complete(generator) == expected()
        assert generator.servers[0].starts == 1


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("ValueError: To serve at least one request, 9 GiB is needed, which is larger than the maximum number of tokens", "no room for one sequence"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "does not fit the GPU's memory"),
        ("ValueError: something new", "see its log"),
    ],
)
def test_a_start_that_fails_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch, log: str, reason: str) -> None:
    monkeypatch.setenv("FAKE_LOG", log)
    with pytest.raises(UserError) as caught:
        open_fake(folder)
    assert reason in str(caught.value) and log in str(caught.value)
    assert log in Path(str(caught.value).partition("its log, ")[2].partition(", says")[0]).read_text(), "the log that the message names is there"


def test_a_python_without_vllm_and_none_at_all_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HAS_NONE", "1")
    with pytest.raises(UserError, match="has no vLLM"):
        open_fake(folder)
    with pytest.raises(UserError, match="no program that can be run"):
        open_fake(folder, python=str(tmp_path / "missing"))
    monkeypatch.delenv(PYTHON)
    with pytest.raises(UserError, match=PYTHON):
        open_fake(folder)


def test_a_vllm_that_answers_without_token_ids_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ANSWER", "text")
    with pytest.raises(UserError, match="without token ids"):
        open_fake(folder)


def test_the_server_inherits_no_rank_and_imports_one_file_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    generator = VllmGenerator(folder, BackendConfig(backend="vllm"))
    environment = generator.servers[0]._environment()
    assert not {"RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert [file.name for file in Path(environment["PYTHONPATH"]).iterdir()] == ["prism_vllm_worker.py"]
    generator.close()
