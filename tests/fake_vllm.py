"""Stands in for the Python of an environment with vLLM, in seconds: answers on the socket as vLLM's server does, with children as it has.

Environment variables say how it behaves. FAKE_DIES_AT: numbers of requests, counted in the file FAKE_COUNTER, at which it sends itself FAKE_SIGNAL
(ENGINE: it stays healthy and writes no more); FAKE_LOG: written, and the start fails; FAKE_PIDS: receives the pids of the server and of a child in a
session of its own; FAKE_ANSWER="text": no token ids; FAKE_SECONDS: how long an answer takes; FAKE_CALLS: a file of what was asked besides
completions; FAKE_KEEPS_CACHE: how often it refuses to drop its cache. Tokens: the prompt's last + 1, + 2, ... + weight, modulo 250, where its one
weight is the last byte of the folder's model.safetensors, or 0; the log-probability of token t is -t, of a prompt's too.
"""

import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

LOCK = threading.Lock()
STATE = {"weight": 0, "refusals": int(os.environ.get("FAKE_KEEPS_CACHE", "0")), "written": 0, "engine": 1}


def weight(folder: str) -> int:
    """What a model folder holds."""
    file = Path(folder) / "model.safetensors"
    return file.read_bytes()[-1] if file.exists() else 0


class Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection."""

    def do_GET(self) -> None:
        self.answer({} if self.path == "/health" else f'vllm:generation_tokens_total{{engine="0"}} {STATE["written"]}.0\n')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            with Path(os.environ.get("FAKE_CALLS", os.devnull)).open("a") as calls:
                calls.write(f"{self.path} {json.dumps(body)}\n")
            if self.path == "/collective_rpc":
                STATE["weight"] = weight(body["kwargs"]["weights_path"])
            STATE["refusals"] -= self.path == "/reset_prefix_cache"
            self.answer({"success": STATE["refusals"] < 0})
            return
        self.count()
        self.write(float(os.environ.get("FAKE_SECONDS", "0")))
        tokens = [(body["prompt"][-1] + place + STATE["weight"]) % 250 for place in range(1, body["max_tokens"] + 1)]
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-float(token) for token in tokens]}}
        if os.environ.get("FAKE_ANSWER") == "text":
            choice = {"text": "abc"}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None, *({str(token): {"logprob": -float(token), "rank": 1}} for token in body["prompt"][1:])]
        self.answer({"choices": [choice]})

    def write(self, seconds: float) -> None:
        """Takes so long, a token now and then; for ever, without one, where the engine hangs."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or not STATE["engine"]:
            time.sleep(0.05)
            STATE["written"] += STATE["engine"]

    def count(self) -> None:
        """Dies at the numbers asked for."""
        if "FAKE_DIES_AT" not in os.environ:
            return
        with LOCK:
            with Path(os.environ["FAKE_COUNTER"]).open("ab") as counter:  # a byte each: one that is killed meanwhile leaves no wrong number
                counter.write(b".")
                counter.flush()
                number = counter.tell()
            if number in map(int, os.environ["FAKE_DIES_AT"].split(",")):
                if os.environ.get("FAKE_SIGNAL") == "ENGINE":
                    STATE["engine"] = 0
                else:
                    os.kill(os.getpid(), getattr(signal, os.environ.get("FAKE_SIGNAL", "SIGKILL")))

    def answer(self, content: dict[str, object] | str) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "socket"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def stand_in(folder: Path) -> Path:
    """A program for PRISM_VLLM_PYTHON that runs this file."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    python.chmod(0o755)
    return python


def alive(pids: Path) -> list[int]:
    """Of the processes in a file of FAKE_PIDS, those that run."""
    from processes import runs

    return [pid for pid in map(int, pids.read_text().split()) if runs(pid)]


def main() -> None:
    if "-c" in sys.argv:  # does it have vLLM?
        sys.exit(int(os.environ.get("FAKE_HAS_NONE", "0")))
    if "FAKE_LOG" in os.environ:
        sys.exit(os.environ["FAKE_LOG"])
    if "FAKE_PIDS" in os.environ:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        with Path(os.environ["FAKE_PIDS"]).open("a") as pids:
            pids.write(f"{os.getpid()} {child.pid} ")
    STATE["weight"] = weight(next(word.removeprefix("--model=") for word in sys.argv if word.startswith("--model=")))
    (socket,) = (word.removeprefix("--uds=") for word in sys.argv if word.startswith("--uds="))
    Server(socket, Handler).serve_forever()


if __name__ == "__main__":
    main()
