"""One step ahead with vLLM itself: it writes while the trainer trains, by the weights that each response names; a server that dies costs nothing.

Slow; runs where PRISM_VLLM_PYTHON names a Python with vLLM. In float32 on a CPU; transformers, opened on the run's checkpoints, is the oracle.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rl_runs

from megatron_prism import artifact
from megatron_prism.engine import parallel, run_folder
from megatron_prism.engine.weights import export_hf
from megatron_prism.errors import UserError
from megatron_prism.generate.transformers_backend import TransformersGenerator
from megatron_prism.generate.vllm_backend import VllmGenerator
from megatron_prism.generate.vllm_server import PYTHON
from megatron_prism.rl import loop
from megatron_prism.rl.records import Response

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with vLLM")]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SETTINGS: dict[str, Any] = {
    "generation__backend": "vllm",
    "generation__batch_size": 1,  # of a step's sixteen responses: it writes for longer than graders and reference take
    "generation__start_timeout_seconds": 900,
    "generation__server_flags__enforce-eager": True,
    "rollout__steps_ahead": 1,
    "rollout__context": 120,
    "rollout__max_new_tokens": 96,
    "optimizer__lr": 2e-2,  # so that a step's weights are told from the next one's by what they write
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": None,
    "samples__interval": 1,
    "steps": 5,
}
KILLED_IN = 3
CLOSE = 1e-3
"""of a log-probability between vLLM and transformers in float32"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inputs with heads of 32, which vLLM's attention on a CPU knows, and with letters to write that are rare in a hundred tokens too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        folder = rl_runs.make_inputs(tmp_path_factory.mktemp("ahead_vllm"), hidden_size=128)
        lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        yield rl_runs.write_prompts(folder, [{**line, "entry": {"answers": list("zqwj"), "credit": "all"}} for line in lines])
    parallel.stop()


@dataclass
class Seen:
    """What a run did. trained, written: begin and end of each step's update, and of each step's writing, by time.monotonic; done: when responses of
    the writing that is under way arrived; used: the responses that each step trained on; generator: the last one that was opened."""

    trained: list[tuple[float, float]] = field(default_factory=list)
    written: list[tuple[float, float]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    used: list[list[Response]] = field(default_factory=list)
    generator: VllmGenerator | None = None


def run(root: Path, output: Path, at_step: Callable[[int, Seen], None], **settings: Any) -> Seen:
    """A run, looked at from outside. at_step: called before each update, with the number of its step."""
    seen = Seen()

    def writing(self: VllmGenerator, requests: Any, sampling: Any, on_done: Any) -> None:
        seen.generator, begun = self, time.monotonic()
        seen.done = []
        generate(self, requests, sampling, lambda *found: (seen.done.append(time.monotonic()), on_done(*found)))
        seen.written.append((begun, time.monotonic()))

    def training(run: loop.Run, batch: Any) -> Any:
        begun = time.monotonic()
        at_step(run.progress.step + 1, seen)
        report = update(run, batch)
        seen.trained.append((begun, time.monotonic()))
        return report

    def drawing(run: loop.Run) -> Any:
        found = drawn(run)
        seen.used.append(found.responses)
        return found

    generate, update, drawn = VllmGenerator.generate_requests, loop._update, loop._drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmGenerator, "generate_requests", writing)
        patch.setattr(loop, "_update", training)
        patch.setattr(loop, "_drawn", drawing)
        loop.reinforce(rl_runs.config(root, output, **{**SETTINGS, **settings}))
    return seen


def kill_in(step: int) -> Callable[[int, Seen], None]:
    """kill -9 of vLLM's server in a step, when the first of the next step's responses are there and the others are not."""

    def kill(number: int, seen: Seen) -> None:
        if number != step:
            return
        end = time.monotonic() + 60
        while not seen.done and time.monotonic() < end:
            time.sleep(0.001)
        assert 0 < len(seen.done) < 16, "in mid step"
        assert seen.generator is not None
        (server,) = seen.generator.servers
        assert server.process is not None
        below = psutil.Process(server.process.pid).children(recursive=True)
        os.kill(next(each.pid for each in below if "api_server" in " ".join(each.cmdline())), signal.SIGKILL)

    return kill


@pytest.fixture(scope="module")
def killed(root: Path) -> tuple[Path, Seen]:
    """Five steps, with a server that is killed in the third, while it writes for the fourth."""
    return root / "killed", run(root, root / "killed", kill_in(KILLED_IN))


def test_the_trainer_trains_while_vllm_writes(killed: tuple[Path, Seen]) -> None:
    """The writing of each step's responses begins before the update of the step before, and ends after that has begun."""
    folder, seen = killed
    assert len(seen.trained) == len(seen.written) == 5
    beside = [min(theirs[1], ours[1]) - max(theirs[0], ours[0]) for ours, theirs in zip(seen.trained, seen.written[1:], strict=False)]
    print(f"seconds of both at once: {[round(one, 2) for one in beside]}; of training: {[round(end - begin, 2) for begin, end in seen.trained]}")
    assert all(one > 0 for one in beside[1:]), "the graders of the first step are only starting"
    norms = [line["grad_norm"] for line in rl_runs.lines(folder)]
    assert all(line["updated"] for line in rl_runs.lines(folder)) and min(norms) > 0


def test_a_server_that_dies_in_mid_step_costs_no_response(killed: tuple[Path, Seen]) -> None:
    folder, seen = killed
    assert artifact.is_complete(folder)
    assert seen.generator is not None and seen.generator.servers[0].starts == 2
    assert [len(rl_runs.samples(folder, step)) for step in range(1, 6)] == [16] * 5
    assert [line["step"] for line in rl_runs.lines(folder)] == [1, 2, 3, 4, 5]


def test_every_response_was_written_by_the_weights_that_it_names(killed: tuple[Path, Seen], tmp_path: Path) -> None:
    """Also those that the server wrote after it was started again: transformers, on that step's checkpoint, finds their log-probabilities."""
    folder, seen = killed
    versions = [{one.weights_version for one in responses} for responses in seen.used]
    assert versions == [{0}, {0}, {1}, {2}, {3}]
    assert [{one["weights_version"] for one in rl_runs.samples(folder, step)} for step in range(1, 6)] == versions
    off = np.array([distances(weights_of(folder, version, tmp_path), seen.used) for version in range(4)])
    print(f"mean difference of log-probabilities, by version (down) and step (across):\n{off}")
    assert all(off[min(versions[step]), step] <= CLOSE for step in range(5))
    others = [off[version, step] for version in range(4) for step in range(5) if {version} != versions[step]]
    assert min(others) > 10 * CLOSE, "no other version would have written them so"


def weights_of(folder: Path, version: int, tmp_path: Path) -> Path:
    """The weights of a step, as a Hugging Face folder."""
    start = folder.parent / "start" if version == 0 else run_folder.step_folder(folder, version)
    return export_hf(start, tmp_path / str(version), "float32")


def distances(folder: Path, used: list[list[Response]]) -> list[float]:
    """Of each step's responses: mean |log p of the generator - log p of these weights| of a token."""
    found = []
    with TransformersGenerator.load(folder) as oracle:
        for responses in used:
            scored = oracle.score([(one.prompt.tokens, one.tokens) for one in responses])
            gaps = [np.subtract(one.logprobs, other.logprobs) for one, other in zip(responses, scored, strict=True)]
            found.append(float(np.abs(np.concatenate(gaps)).mean()))
    return found


def test_the_mismatch_is_logged_at_equal_weights_and_the_lag_beside_it(killed: tuple[Path, Seen]) -> None:
    lines = rl_runs.lines(killed[0])
    print("mismatch, lag_mismatch:", [(f"{line['mismatch']:.1e}", f"{line['lag_mismatch']:.1e}") for line in lines])
    assert [line["lag"] for line in lines] == [0, 1, 1, 1, 1]
    assert max(line["mismatch"] for line in lines) < CLOSE
    assert lines[0]["lag_mismatch"] < CLOSE < 10 * CLOSE < min(line["lag_mismatch"] for line in lines[1:])


def test_a_server_that_stays_dead_ends_the_run_and_what_was_written_is_trained_on_later(root: Path) -> None:
    """The run ends in step 3, whose responses lie in the checkpoint of step 2: weights of step 1 wrote them, and nothing has these any more."""
    output = root / "ended"
    with pytest.raises(UserError, match=rf"step {KILLED_IN}: .*failed 1 times \(max_restarts=0\).*Nothing of this step was saved") as raised:
        run(root, output, kill_in(KILLED_IN), generation__max_restarts=0)
    newest = run_folder.step_folder(output, KILLED_IN - 1)
    assert str(newest) in str(raised.value) and run_folder.newest(output) == newest and not artifact.is_complete(output)
    seen = run(root, output, lambda *_: None, generation__max_restarts=0)
    assert artifact.is_complete(output) and [line["lag"] for line in rl_runs.lines(output)] == [0, 1, 1, 1, 1]
    assert [{one.weights_version for one in responses} for responses in seen.used] == [{1}, {2}, {3}]
    assert distances(weights_of(output, 1, output), seen.used[:1])[0] <= CLOSE
