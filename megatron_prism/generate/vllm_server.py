"""One vLLM server: a process of its own, in an environment of its own, that answers on a Unix socket.

vLLM pins another torch than ours, so that its own OpenAI-compatible server runs under the Python that the settings name (as a module: the command
`vllm serve` of its CPU build, 0.32, looks for a package that is called otherwise there). A socket in a
private folder needs no port, and no other user of the machine reaches it. `guard` ends the server with this process.

Owns: starting, health, asking, restarting, ending, and what a failed start means: bad input where vLLM says so of a server that never came up, else a
machine that may do better at the next start. Refuses: a Python without vLLM, a vLLM that answers without token ids. Light: standard library alone.
"""

import http.client
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_prism.errors import MachineError, UserError
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.temporary import TemporaryFolder

PYTHON = "PRISM_VLLM_PYTHON"
"""Environment variable: the Python of vLLM's environment, where the settings name none."""
NAME = "model"
"""of the model, in requests"""
OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "MASTER_ADDR", "MASTER_PORT", "TORCHDYNAMO_DISABLE")
"""Environment variables with which the server would import our packages or join our process group (the others that torchrun sets count too), or
could not compile: the CPU layer of a trainer in this process turns torch.compile off"""
NEWS_SECONDS = 30.0
"""A start says so often how far it is."""
TOKEN_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
"""of vLLM's figures for Prometheus"""
HEALTH_SECONDS = 60.0
"""A server that has answered nothing for this long is asked for its health, and has as long to answer."""
logger = logging.getLogger(__name__)


class LostError(Exception):
    """The server did not answer a request: it died, or its engine did."""


class Server:
    """A vLLM server of one model.

    folder: of the model. gpus: values for CUDA_VISIBLE_DEVICES, or None for what this process sees. label: for messages and the log's name.
    """

    def __init__(self, folder: Path, config: BackendConfig, max_model_len: int | None, gpus: Sequence[str] | None = None, label: str = "0"):
        self.folder, self.config, self.max_model_len, self.gpus, self.label = folder, config, max_model_len, gpus, label
        self.python = find_python(config.python)
        self.folder_of_its_own = TemporaryFolder("vllm-server", Path("/tmp"))  # a socket's path must stay under 108 characters
        self.home = self.folder_of_its_own.path
        log_folder = config.log if config.log is not None else self.home
        log_folder.mkdir(parents=True, exist_ok=True)
        self.log = log_folder / f"vllm-{label}.log"
        self.starts, self.failed, self.closing = 0, False, False
        self.losses, self.came_up = 0, False
        """how often it was lost since work was last finished, and whether it ever answered"""
        self.process: subprocess.Popen[bytes] | None = None
        self._still: tuple[list[str], float] | None = None
        """the engine's counts of tokens, and since when they stand still, while nothing is answered"""
        self._asked, self._stall_seconds = set[object](), config.stall_seconds
        """requests that wait for their answers; how long the counts may stand still meanwhile"""
        self._restarting, self._sockets = threading.Lock(), set[socket.socket]()  # the lock: of who starts or ends the process beside other threads

    def start(self) -> None:
        """Start the process; `wait_ready` waits for it."""
        self.starts, self._still = self.starts + 1, None
        self.socket = self.home / f"{self.starts}.sock"
        command = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(self.python), *self._arguments()]
        self._say(f"starting; its log: {self.log}")
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment(), start_new_session=True)

    def _arguments(self) -> list[str]:
        config = self.config
        flags: dict[str, Any] = {
            "uds": self.socket,
            "served-model-name": NAME,
            "dtype": config.dtype,
            "max-num-seqs": config.batch_size,
            "tensor-parallel-size": config.tensor_parallel,
            "gpu-memory-utilization": config.gpu_memory_utilization,
            "generation-config": "vllm",  # not the folder's defaults, a repetition penalty, say
            "disable-uvicorn-access-log": True,
            "worker-extension-cls": "prism_vllm_worker.Reloading",
            **({"max-model-len": self.max_model_len} if self.max_model_len is not None else {}),
            **config.server_flags,
        }
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value is not False]
        return ["-m", "vllm.entrypoints.openai.api_server", f"--model={self.folder.resolve()}", *words]

    def _environment(self) -> dict[str, str]:
        ours = [name for name in os.environ if name in OURS or name.startswith("TORCHELASTIC_") or name.endswith(("RANK", "WORLD_SIZE"))]
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        if self.gpus is not None:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        # development mode has the endpoints that reload weights; the socket is private
        return {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **kept, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(self._imports())}

    def _imports(self) -> Path:
        """A folder with the one file of ours that the server imports, so that nothing else is found there."""
        folder = self.home / "imports"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("vllm_worker.py"), folder / "prism_vllm_worker.py")
        return folder

    def wait_ready(self) -> None:
        """Until the server answers. Errors: UserError with the reason that its log shows, a MachineError where that may pass; LostError where it is
        closed meanwhile."""
        assert self.process is not None
        began = spoken = time.monotonic()
        while not self.is_healthy(5.0):
            if self.closing:
                raise LostError(f"vllm server {self.label} was closed while it started")
            if self.process.poll() is not None:
                log = self.log_text()
                kind = UserError if is_bad_input(log) and not self.came_up else MachineError
                raise self._failure(explain(log, self.log, self.config, self.python), kind)
            if time.monotonic() - began > self.config.start_timeout_seconds:
                limit = self.config.start_timeout_seconds
                raise self._failure(f"vllm server {self.label} does not answer after start_timeout_seconds={limit}; its log: {self.log}")
            if time.monotonic() - spoken > NEWS_SECONDS:
                spoken = time.monotonic()
                self._say(f"starting for {spoken - began:.0f} s: {(self.log_text().splitlines() or [''])[-1][:200]}")
            time.sleep(0.2)
        self.came_up = True
        self._say(f"ready after {time.monotonic() - began:.0f} s")

    def _say(self, text: str) -> None:
        """News of a start, which takes minutes: to whoever watches, beside any output of the program."""
        print(f"vllm server {self.label}: {text}", file=sys.stderr, flush=True)

    def is_healthy(self, timeout: float) -> bool:
        """Whether the server answers within so many seconds and its engine lives."""
        try:
            return self._send("GET", "/health", None, timeout)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _failure(self, message: str, kind: type[UserError] = MachineError) -> UserError:
        self.failed = True
        return kind(message)

    def forget_losses(self) -> None:
        """What it was asked is answered: it works, and the next loss is the first. Called when a whole call's work is done, and not for an answer:
        a server that dies of one request would answer others for ever."""
        self.losses = 0

    def ask(self, path: str, body: dict[str, Any], dropped: threading.Event | None = None) -> dict[str, Any]:
        """The answer to one request; a server that fails is started again and asked again.

        dropped: once it is set, nobody waits for the answer: a failure is a LostError. Errors: MachineError when starting again does not help;
        UserError for a request that vLLM refuses.
        """
        while True:
            with self._restarting:  # not while the server is being started again
                starts = self.starts
            try:
                return self._answer(path, body)
            except LostError as loss:
                if self.closing or (dropped is not None and dropped.is_set()):
                    raise
                self._restart(starts, loss)

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self._asked:
            self._still = None
        self._asked.add(one := object())
        try:
            status, content = self._send("POST", path, body, None)
        except (OSError, http.client.HTTPException) as error:
            raise LostError(repr(error)) from error
        finally:
            self._asked.discard(one)
        if status >= 500:
            raise LostError(f"status {status}: {content[:500].decode(errors='replace')}")
        if status != 200:
            raise UserError(f"vllm refused a request (status {status}): {content[:2000].decode(errors='replace')}")
        self._still = None
        found: dict[str, Any] = json.loads(content) if content else {}
        return found

    def read_weights(self, folder: Path) -> None:
        """Take the weights of this folder, and forget what was read with the old ones. From now on a server that is started again reads it too.

        Nothing of ours is under way; what was given up may still be, and a cache that it holds would outlive the reset: it is ended first.
        """
        self.folder = folder
        self._stall_seconds = self.config.start_timeout_seconds  # no token is written meanwhile
        try:
            with self.watched():
                self.ask("/pause?mode=abort", {})
                self.ask("/collective_rpc", {"method": "prism_reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
                self._drop_prefix_cache()
                self.ask("/resume", {})
        finally:
            self._stall_seconds = self.config.stall_seconds

    def _drop_prefix_cache(self) -> None:
        end = time.monotonic() + HEALTH_SECONDS
        while not self.ask("/reset_prefix_cache", {}).get("success", True):
            if time.monotonic() > end:
                raise self._failure(f"vllm server {self.label} keeps its prefix cache, which old weights made; its log: {self.log}")
            time.sleep(0.1)

    def _restart(self, starts: int, loss: LostError) -> None:
        """Start the server again, unless another thread has done so since `starts`."""
        with self._restarting:
            if self.starts != starts or self.closing:
                return
            self.losses += 1
            if self.losses > self.config.max_restarts:
                said = f"failed {self.losses} times (max_restarts={self.config.max_restarts}) with no work done in between, last: {loss}"
                raise self._failure(f"vllm server {self.label} {said}; its log: {self.log}")
            logger.warning("vllm server %s failed (%s); starting it again", self.label, loss)
            self._end()
            if not self.closing:
                self.start()
                self.wait_ready()

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None) -> tuple[int, bytes]:
        connection = _Connection(self.socket, timeout)
        connection.connect()
        self._sockets.add(connection.sock)
        try:
            if self.closing:  # `close` has hung up on those that it saw
                raise ConnectionAbortedError("the server is being closed")
            text = None if body is None else json.dumps(body).encode()
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._sockets.discard(connection.sock)
            connection.close()

    def check(self) -> None:
        """Hang up where the server does not answer any more, or its engine has written no token for `stall_seconds` (who waits then starts it again);
        called when no request has been answered for long."""
        if self._asked and self._restarting.acquire(blocking=False):  # one that has answered all of its share may stand still
            try:
                if not self.is_healthy(HEALTH_SECONDS):
                    logger.warning("vllm server %s has not answered for %.0f s", self.label, HEALTH_SECONDS)
                    self.abandon()
                elif self._is_stalled():
                    logger.warning("vllm server %s answers, but its engine has written nothing for %d s", self.label, self._stall_seconds)
                    self.abandon()
            finally:
                self._restarting.release()

    def _is_stalled(self) -> bool:
        """The server is healthy so long as its engine's process is there: whether that works is seen by the tokens that it has read and written."""
        try:
            status, text = self._send("GET", "/metrics", None, HEALTH_SECONDS)
        except (OSError, http.client.HTTPException):
            return False  # the next look asks for its health
        counts = [line for line in text.decode(errors="replace").splitlines() if line.startswith(TOKEN_COUNTERS)]
        if status != 200 or not counts:  # --disable-log-stats
            return False
        now = time.monotonic()
        if self._still is None or self._still[0] != counts:
            self._still = counts, now
        return now - self._still[1] >= self._stall_seconds

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, where this thread waits for an answer that no other looks after, a server that hangs is noticed."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(HEALTH_SECONDS):
                self.check()

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def abandon(self) -> None:
        """Hang up on every request that is under way; the server drops them."""
        for each in list(self._sockets):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def log_text(self) -> str:
        """What this start has logged."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def _end(self) -> None:
        if self.process is not None:
            pipe: IO[bytes] | None = self.process.stdin
            assert pipe is not None
            pipe.close()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End the server and its children, and remove its temporary folder, unless an error has named the log in it.

        A start that another thread has begun is given up and waited for, and no other begins: what it started would be ended by nobody.
        """
        self.closing = True
        self.abandon()
        with self._restarting:
            self._end()
        if self.failed and self.log.is_relative_to(self.home):
            self.folder_of_its_own.keep()
        else:
            self.folder_of_its_own.remove()


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float | None):
        super().__init__("localhost")
        self.path, self.seconds = path, timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.seconds)
        self.sock.connect(str(self.path))


def find_python(named: Path | None) -> Path:
    """The Python that has vLLM. Errors: UserError where none is named, it does not exist, or it has no vLLM."""
    python = named if named is not None else Path(os.environ[PYTHON]) if os.environ.get(PYTHON) else None
    if python is None:
        raise UserError(f"backend=vllm needs the Python of an environment with vLLM: set generation.python or ${PYTHON} (docs/generate.md makes one)")
    if not os.access(python, os.X_OK):
        raise UserError(f"{python}, named by {'python' if named else '$' + PYTHON} for backend=vllm, is no program that can be run")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-I", "-c", code], capture_output=True, timeout=120, check=False).returncode != 0:
        raise UserError(f"{python} has no vLLM; install it there (`{python} -m pip install vllm`), or name another Python in {PYTHON}")
    return python


REASONS = (
    ("larger than the maximum number of tokens", "the cache has no room for one sequence of the longest length"),
    ("No available memory for the cache blocks", "no memory is left for the cache beside the weights"),
    ("is less than desired GPU memory utilization", "other processes hold the GPU's memory"),
    ("out of memory", "the model does not fit the GPU's memory"),
    ("unrecognized arguments", "this vLLM does not know a flag in server_flags"),
    ("are not supported for now", "this vLLM does not know the model's architecture"),
    ("is greater than the derived max_model_len", "max_model_len passes the model's positions"),
    ("must be divisible by tensor parallel size", "tensor_parallel does not divide the model's heads"),
)
"""What vLLM's log says, and what it means"""
PASSING = ("is less than desired GPU memory utilization", "out of memory")
"""those that other processes on the GPU make, too: a run before this one that is not gone yet"""


def is_bad_input(log: str) -> bool:
    """Whether a failed start's log says that the settings are wrong, whatever the machine; one that says nothing we know does not."""
    return any(sign in log for sign, _ in REASONS) and not any(sign in log for sign in PASSING)


def explain(log: str, file: Path, config: BackendConfig, python: Path) -> str:
    """Why a server did not start, from its log, and what to do."""
    lines = log.splitlines()
    meaning = next((meaning for sign, meaning in REASONS if sign in log), "see its log")
    errors = [line for line in lines if "Error" in line or "error:" in line][-3:] or lines[-5:]
    sizes = f"max_model_len={config.max_model_len}, gpu_memory_utilization={config.gpu_memory_utilization}, tensor_parallel={config.tensor_parallel}"
    said = "\n".join(f"  {line.strip()[:400]}" for line in errors)
    return f"vllm ({python}) did not start: {meaning}; the settings are {sizes}; its log, {file}, says:\n{said}"
