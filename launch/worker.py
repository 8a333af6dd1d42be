"""A process that runs one-process stages, one after another, so that torch is imported once for all of them.

Why a process of its own and not the pipeline's: a stage that is killed (memory, a crash in a library) must not take along the pipeline, which says
where to look; and what a stage leaves behind in a process (patches of the CPU layer, GPU memory) ends with the worker, before training starts.

    python -m megatron_prism.launch.worker REQUESTS RESULTS      two descriptors; JSON lines
"""

import gc
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Self

from megatron_prism import stages
from megatron_prism.config import load_recipe
from megatron_prism.errors import STOPPED_EARLY, StoppedEarly, UserError
from megatron_prism.launch.child import Child, readable
from megatron_prism.launch.job import Job, Outcome, environment, outcome_of, prism_arguments


class Worker(Child):
    """The pipeline's end of a worker process."""

    def __init__(self) -> None:
        requests, self._requests = os.pipe()
        self._results, results = os.pipe()
        argv = [sys.executable, "-m", "megatron_prism.launch.worker", str(requests), str(results)]
        super().__init__(argv, environment(Job("prep")), pass_fds=(requests, results))
        os.close(requests)
        os.close(results)

    def run(self, job: Job, log: Path) -> Outcome:
        """Run one stage there; its output goes to our terminal and to the end of `log`."""
        request = {"stage": job.stage, "recipe": str(job.recipe) if job.recipe else None, "overrides": job.overrides}
        os.write(self._requests, (json.dumps(request) + "\n").encode())
        self.copy_output(log, title=shlex.join(["prism", *prism_arguments(job)]), until=self._results)
        answered = readable([self._results], 0)
        answer = os.read(self._results, 1 << 20) if answered else b""
        # An empty answer is the closed pipe of a worker that is gone, or about to be.
        return Outcome(**json.loads(answer)) if answer else outcome_of(self.wait())

    def close(self) -> None:
        """Let it end by itself: an empty request pipe is its sign to go."""
        os.close(self._requests)
        os.close(self._results)
        self.wait()

    def __enter__(self) -> Self:
        return self


def main() -> None:
    """Serve requests until the other end closes."""
    request_fd, result_fd = (int(word) for word in sys.argv[1:3])
    for descriptor in (request_fd, result_fd):
        os.set_inheritable(descriptor, False)
    with os.fdopen(request_fd) as requests:
        for line in requests:
            request = json.loads(line)
            recipe = Path(request["recipe"]) if request["recipe"] else None
            outcome = _run(Job(request["stage"], recipe, tuple(request["overrides"])))
            gc.collect()
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(result_fd, json.dumps(outcome.__dict__).encode())


def _run(job: Job) -> Outcome:
    sys.argv = ["prism", *prism_arguments(job)]  # what provenance records: the command that makes this stage alone
    try:
        stage = stages.load(job.stage)
        stage.run(load_recipe(job.recipe, job.overrides, stage.Config))
    except UserError as error:
        return Outcome(2, str(error))
    except StoppedEarly as stopped:
        return Outcome(STOPPED_EARLY, str(stopped))
    except SystemExit as error:
        if isinstance(error.code, str):
            return Outcome(1, error.code)
        return outcome_of(error.code or 0)
    except Exception as error:
        traceback.print_exc()
        return Outcome(1, f"{type(error).__name__}: {error}")
    return Outcome(0)


if __name__ == "__main__":
    main()
