"""The newest figures of a run for a Prometheus server on the same machine: `log.prometheus = PORT`, off by default.

    GET http://127.0.0.1:PORT/metrics        the only request that is answered

Owns: the names of the figures and the endpoint's thread, on rank 0. Refuses: every other path and method, and to listen on any address but loopback;
nothing can be set or started through it. What is scraped is what the last lines of metrics.jsonl said.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError

Figures = dict[str, Any]
LOOPBACK = "127.0.0.1"
PATH = "/metrics"
REQUEST_SECONDS = 5.0
"""a client that says nothing for so long is hung up on"""

GAUGES = {
    "step": ("step", "optimizer steps taken"),
    "loss": ("loss", "training loss of the last logged step"),
    "tokens": ("tokens", "tokens trained on; a run that goes back to a checkpoint has fewer again, so this is no counter"),
    "responses": ("responses", "responses written; no counter either"),
    "lr": ("learning_rate", "learning rate of the last logged step"),
    "grad_norm": ("grad_norm", "gradient norm before clipping"),
    "tokens_per_second": ("tokens_per_second", "training tokens a second over all ranks"),
    "seconds_per_step": ("step_seconds", "seconds of a step"),
    "data_wait_seconds": ("data_wait_seconds", "seconds of a step that were spent waiting for data"),
    "tflops_per_rank": ("tflops_per_rank", "model TFLOP/s of one rank, causal attention, recomputation not counted"),
    "mfu": ("mfu_ratio", "model FLOP utilization, causal attention, recomputation not counted, of the bf16 peak"),
    "memory_gib": ("memory_gib", "peak of allocated GPU memory of rank 0"),
    "eta_seconds": ("eta_seconds", "seconds until the last step at the present rate"),
    "validation/loss": ("validation_loss", "loss on held-out samples"),
    "checkpoint_seconds": ("checkpoint_save_seconds", "seconds that the last save took"),
    "reward": ("reward", "mean reward of the last step's responses"),
    "pass_rate": ("pass_rate", "share of right responses"),
    "entropy": ("entropy", "entropy estimate of the written tokens, nats a token"),
    "length": ("response_tokens", "mean tokens of a response"),
    "truncated": ("truncated_ratio", "share of responses cut off by their limit"),
    "kl": ("kl", "KL to the reference, nats a token"),
    "mismatch": ("mismatch", "mean |log p of the trainer - log p of the generator|, nats a token"),
    "groups_all_equal": ("groups_all_equal", "groups whose rewards are all the same"),
    "gradings_failed": ("gradings_failed", "gradings of the last step that say nothing"),
    "generation_share": ("generation_ratio", "share of a step spent generating"),
    "generated_tokens_per_second": ("generated_tokens_per_second", "tokens a second written by the policy"),
    "trained_tokens_per_second": ("trained_tokens_per_second", "tokens a second trained on"),
}
"""key of metrics.jsonl -> name after prism_, meaning"""
COUNTED = {
    "checkpoint_seconds": ("checkpoints", "checkpoints saved by this process"),
    "bad_step": ("bad_steps", "steps of this process whose loss or gradient was no number"),
    "rollback": ("rollbacks", "times that this process went back to a checkpoint after a jump of the loss"),
}
"""key of metrics.jsonl -> name after prism_ and before _total, meaning; the number of lines that have it"""
LABELLED = {
    "loss/": ("source_loss", "source", "training loss of one source"),
    "validation/loss/": ("validation_source_loss", "source", "loss on held-out samples of one source"),
    "reward/": ("domain_reward", "domain", "mean reward of one domain's responses"),
    "pass_rate/": ("domain_pass_rate", "domain", "share of right responses of one domain"),
    "evaluation/": ("evaluation_score", "task", "score of the newest evaluation inside the run"),
    "seconds/": ("phase_seconds", "phase", "seconds of one phase of a step of RL"),
}
"""beginning of keys -> name after prism_, what the rest of the key is, meaning"""


class Exported:
    """What a scrape is answered with: the newest value of each figure. A collector of prometheus_client."""

    def __init__(self, run: Path, settings: Figures) -> None:
        self.run, self.steps = run, settings.get("steps")
        self._newest: Figures = {}
        self._counts = dict.fromkeys(COUNTED, 0)
        self._lock = threading.Lock()

    def take(self, record: Figures) -> None:
        """A line of the log."""
        with self._lock:
            self._newest |= {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
            self._newest["_seen"] = time.time()
            for key in COUNTED.keys() & record.keys():
                self._counts[key] += 1

    def collect(self) -> Iterator[Any]:
        """Families of figures, as prometheus_client asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        with self._lock:
            newest, counts = dict(self._newest), dict(self._counts)
        yield InfoMetricFamily("prism_run", "which run this is", {"output": str(self.run)})
        for key, (name, meaning) in GAUGES.items():
            if key in newest:
                yield GaugeMetricFamily(f"prism_{name}", meaning, newest[key])
        for start, (name, label, meaning) in LABELLED.items():
            family = GaugeMetricFamily(f"prism_{name}", meaning, labels=[label])
            for key in (key for key in newest if key.startswith(start) and "/" not in key.removeprefix(start)):
                family.add_metric([key.removeprefix(start)], newest[key])
            if family.samples:
                yield family
        for key, (name, meaning) in COUNTED.items():
            yield CounterMetricFamily(f"prism_{name}", meaning, counts[key])
        yield from self._times(newest, GaugeMetricFamily)

    def _times(self, newest: Figures, gauge: Callable[..., Any]) -> Iterator[Any]:
        if self.steps is not None:
            yield gauge("prism_steps", "steps that the run will have", self.steps)
        if "_seen" in newest:
            yield gauge("prism_last_line_timestamp_seconds", "when the run last wrote to its log", newest["_seen"])
        checkpoint = run_folder.newest(self.run)
        if checkpoint is not None:
            age = time.time() - (checkpoint / artifact.COMPLETE).stat().st_mtime
            yield gauge("prism_checkpoint_step", "step of the newest complete checkpoint", int(checkpoint.name.removeprefix("step_")))
            yield gauge("prism_checkpoint_age_seconds", "seconds since it was complete", age)


class Endpoint:
    """The HTTP endpoint of a run. Errors: UserError for a port that is taken."""

    def __init__(self, run: Path, port: int, settings: Figures) -> None:
        from prometheus_client import CollectorRegistry

        self.figures = Exported(run, settings)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.figures)
        try:
            self.server = _Server((LOOPBACK, port), _handler(registry))
        except OSError as error:
            raise UserError(_refusal(port, error)) from None
        self.address = f"http://{LOOPBACK}:{self.server.server_address[1]}{PATH}"
        threading.Thread(target=self.server.serve_forever, name="prometheus", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news for the run's log."""


def _handler(registry: Any) -> type[BaseHTTPRequestHandler]:
    """A handler that knows one request."""
    from prometheus_client.exposition import choose_encoder

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS
        server_version, sys_version = "prism", ""

        def handle_one_request(self) -> None:
            """As http.server reads a request, but of all methods GET alone is looked at."""
            self.raw_requestline = self.rfile.readline(8193)
            if len(self.raw_requestline) > 8192 or not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self.close_connection = True
            if self.command != "GET":
                self._answer(405, b"", "text/plain", Allow="GET")
            elif self.path.partition("?")[0] != PATH:
                self._answer(404, b"", "text/plain")
            else:
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, encode(registry), content_type)

        def _answer(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape every few seconds is no news for the run's log."""

    return Handler


def check_port(port: int) -> None:
    """Errors: UserError for a port that another process has. 0 is free always: the system chooses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise UserError(_refusal(port, error)) from None


def _refusal(port: int, error: OSError) -> str:
    why = error.strerror or str(error)
    return (
        f"log.prometheus={port}: {LOOPBACK}:{port} cannot be listened on ({why}), another run of this machine may have it; "
        "give another port, or log.prometheus=0, which picks a free one and says which, or none"
    )
