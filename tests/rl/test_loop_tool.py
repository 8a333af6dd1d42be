"""The calculator through the whole loop: who uses it is right, and what it put in is read, and neither graded nor trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import rl_runs
from idle_generator import IdleGenerator
from transformers import AutoTokenizer

from megatron_prism.engine import parallel
from megatron_prism.generate import open_backend
from megatron_prism.generate.interface import Completion, Generator, Request, Sampling, cut_at_stop
from megatron_prism.rl import generators, loop

RESULT = "<result>4365229661</result>"
GRADED = {"grader": "exact", "extraction": "answer_line", "entry": {"answer": "4365229661"}}
SUMS = [{"id": domain, "domain": domain, "question": "48217 * 90533?", **GRADED} for domain in ("even", "odd")]
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "samples__interval": 1,
    "rollout__tool__max_calls": 1,
    "rollout__context": 120,
    "rollout__max_new_tokens": 100,
    "prompts__prompts_per_step": 2,
}


class Student(IdleGenerator):
    """Calculates with the tool where its sample's number is even, and guesses elsewhere; as likely as the model that it stands for says."""

    def __init__(self, model: Generator) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def weights_version(self) -> int:
        return self.model.weights_version

    def update_weights(self, tensors: Any, version: int | None = None) -> None:
        self.model.update_weights(tensors, version)

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[Request, Completion], None]) -> None:
        for request in requests:
            tokens = self.tokenizer(self.says(request) + "</s>")["input_ids"]
            ends = (n for n in range(1, len(tokens) + 1) if tokens[n - 1] == 0 or cut_at_stop(self.tokenizer.decode(tokens[:n]), sampling.stop)[1])
            tokens = tokens[: next(ends)]
            [scored] = self.model.score([(request.prompt, tokens)])
            text = cut_at_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), sampling.stop)[0]
            on_done(request, Completion(text, tuple(tokens), "stop", scored.logprobs, weights_version=self.weights_version))

    def says(self, request: Request) -> str:
        before = self.tokenizer.decode(list(request.prompt))
        if "<result>" in before:
            return "\nAnswer: " + before.rpartition("<result>")[2].partition("<")[0]
        return "<tool>48217 * 90533</tool>" if request.sample % 2 == 0 else "I guess.\nAnswer: 7"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two steps of eight responses, half of them with the tool; the batches that were trained on are kept beside."""
    rl_runs.make_inputs(tmp_path)
    rl_runs.write_prompts(tmp_path, SUMS)
    trained: list[Any] = []
    update = loop._update
    monkeypatch.setattr(generators, "open_backend", lambda folder, asked: Student(open_backend(folder, asked)))
    monkeypatch.setattr(loop, "_update", lambda run, batch: (trained.append(batch), update(run, batch))[1])
    yield loop.reinforce(rl_runs.config(tmp_path, tmp_path / "run", **SETTINGS)), trained
    parallel.stop()


def test_the_tool_is_rewarded_and_what_it_put_in_is_neither_graded_nor_trained_on(run: Any) -> None:
    folder, trained = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf_files")
    for step, (line, batch) in enumerate(zip(rl_runs.lines(folder), trained, strict=True), 1):
        responses = rl_runs.samples(folder, step)
        assert [one["reward"] for one in responses] == [1.0, 0.0, 1.0, 0.0] * 2
        assert not any("result" in one["text"] for one in responses), "graded is what the model wrote"
        assert line["updated"] == 1.0 and line["mismatch"] < 1e-5, "each written token was scored behind all that the model had read"
        assert line["length"] == sum(one["num_written"] for one in responses) / 8 < sum(len(one["tokens"]) for one in responses) / 8
        for one, sequence in zip(responses, batch.sequences, strict=True):
            begin = len(sequence.tokens) - len(one["tokens"])
            scored = sequence.scored[begin:]
            assert scored.sum() == one["num_written"] and not sequence.scored[:begin].any()
            put_in = tokenizer.decode([token for token, own in zip(one["tokens"], scored, strict=True) if not own])
            assert put_in == (RESULT if one["sample"] % 2 == 0 else "")
