"""What every backend of generation keeps, over the same cases: transformers here, vLLM where PRISM_VLLM_PYTHON names its Python (slow).

The truth is `model.generate` and one forward pass of transformers, in float32.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_hf import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prism import generate
from megatron_prism.errors import UserError
from megatron_prism.generate import Completion, Generator, Request, Sampling, vllm_server
from megatron_prism.generate.interface import cut_at_stop
from megatron_prism.generate.transformers_backend import TransformersGenerator
from megatron_prism.generate.vllm_backend import VllmGenerator
from megatron_prism.generate.vllm_server import PYTHON

PROMPTS = ["the cat", "a", "one two three four five six seven", "def f(x):\n    return x"]
CLOSE = 1e-3
"""of a log-probability between two implementations in float32"""
SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "vllm": {"server_flags": {"enforce-eager": True}, "start_timeout_seconds": 900, "stall_seconds": 10},
}
needs_vllm = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with vLLM")]
both = [pytest.param("transformers"), pytest.param("vllm", marks=needs_vllm)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape; heads of 32, which vLLM's attention on a CPU knows."""
    return [make_tiny_model(tmp_path_factory.mktemp("model") / str(seed), seed=seed, hidden_size=128) for seed in (3, 4)]


@pytest.fixture(scope="module", params=both)
def generator(request: pytest.FixtureRequest, folders: list[Path]) -> Iterator[Generator]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
            patch.setenv(name, value)
        with generate.load(folders[0], request.param, batch_size=8, **SETTINGS[request.param]) as opened:
            yield opened


def greedy_of_transformers(folder: Path, count: int) -> list[list[int]]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        found.append(model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :].tolist())
    return found


def true_logprobs(folder: Path, prompt: list[int], tokens: tuple[int, ...]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        table = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return [table[len(prompt) - 1 + place, token].item() for place, token in enumerate(tokens)]


def tokens(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[list(completion.tokens) for completion in row] for row in found]


def test_greedy_is_transformers_generate(generator: Generator, folders: list[Path]) -> None:
    found = generator.generate(PROMPTS, Sampling(max_new_tokens=24))
    assert [row[0] for row in tokens(found)] == greedy_of_transformers(folders[0], 24)


def test_log_probabilities_are_the_models_own(generator: Generator, folders: list[Path]) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=10, seed=4)
    for prompt, (completion,) in zip(PROMPTS, generator.generate(PROMPTS, sampling), strict=True):
        expected = true_logprobs(folders[0], generator.tokenizer(prompt)["input_ids"], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def test_a_sample_is_asked_again_by_its_place_and_number(generator: Generator) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, n=3, max_new_tokens=12, seed=5)
    whole = generator.generate(PROMPTS, sampling)
    assert tokens(whole) == tokens(generator.generate(PROMPTS, sampling))
    assert len({tuple(map(tuple, row)) for row in tokens(whole)}) == len(PROMPTS)
    assert all(len({completion.tokens for completion in row}) == 3 for row in whole)
    again: dict[tuple[int, int], Completion] = {}
    asked = [Request(tuple(generator.tokenizer(PROMPTS[place])["input_ids"]), place, sample) for place, sample in ((2, 1), (0, 2))]
    generator.generate_requests(asked, sampling, lambda request, found: again.update({(request.place, request.sample): found}))
    assert {key: found.tokens for key, found in again.items()} == {(2, 1): whole[2][1].tokens, (0, 2): whole[0][2].tokens}
    assert tokens(generator.generate(PROMPTS, replace(sampling, seed=6))) != tokens(whole)


def test_a_request_may_ask_for_less(generator: Generator) -> None:
    done: dict[int, Completion] = {}
    asked = [Request((5, 6, 7), place, max_new_tokens=limit) for place, limit in enumerate((3, None, 99))]
    generator.generate_requests(asked, Sampling(max_new_tokens=6), lambda request, found: done.update({request.place: found}))
    assert [len(done[place].tokens) for place in range(3)] == [3, 6, 6]
    assert {found.finish_reason for found in done.values()} == {"length"}


def test_a_stop_string_ends_a_completion_and_is_cut_off(generator: Generator) -> None:
    free = generator.generate(PROMPTS, Sampling(max_new_tokens=24))
    stop = next(text[place : place + 2] for text in (free[0][0].text,) for place in range(4, 20) if text[place : place + 2].isascii())
    for (before,), (after,) in zip(free, generator.generate(PROMPTS, Sampling(max_new_tokens=24, stop=(stop,))), strict=True):
        text, stopped = cut_at_stop(before.text, (stop,))
        assert (after.text, after.finish_reason) == (text, "stop" if stopped else before.finish_reason)
        assert before.tokens[: len(after.tokens)] == after.tokens and len(after.logprobs) == len(after.tokens)
        assert not stopped or len(after.tokens) < len(before.tokens)


def test_the_end_of_sequence_token_ends_a_completion_and_is_kept(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(generator, TransformersGenerator | VllmGenerator)
    free = generator.generate(PROMPTS, Sampling(max_new_tokens=16))
    end = free[0][0].tokens[5]
    monkeypatch.setattr(generator.speller, "eos_ids", [end])
    ending = generator.generate(PROMPTS, Sampling(max_new_tokens=16))
    assert ending[0][0].finish_reason == "stop"
    for (before,), (after,) in zip(free, ending, strict=True):
        count = before.tokens.index(end) + 1 if end in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:count]


def test_scores_are_those_of_one_forward_pass(generator: Generator, folders: list[Path]) -> None:
    (likeliest,) = generator.generate([[5, 6, 7]], Sampling(max_new_tokens=8))[0]
    pairs = [((5, 6, 7), likeliest.tokens), ((5, 6, 7), (8, 9, 10)), ((9,), (4,)), (tuple(range(1, 100)), tuple(range(100, 127)))]
    found = generator.score(pairs)
    assert [scored.greedy for scored in found[:2]] == [True, False]
    for (prompt, continuation), scored in zip(pairs, found, strict=True):
        np.testing.assert_allclose(scored.logprobs, true_logprobs(folders[0], list(prompt), continuation), atol=CLOSE, rtol=0)


def test_an_error_while_completions_arrive_reaches_the_caller_and_the_next_call_works(generator: Generator) -> None:
    def full(request: Request, found: Completion) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        generator.generate_requests([Request((5, 6), place) for place in range(20)], Sampling(max_new_tokens=20), full)
    assert len(generator.generate([[5, 6]], Sampling(max_new_tokens=3))[0][0].tokens) == 3


def test_new_weights_replace_the_old_ones_strictly(generator: Generator, folders: list[Path]) -> None:
    new = dict(AutoModelForCausalLM.from_pretrained(folders[1]).state_dict())
    with pytest.raises(UserError, match="was not given 1 of the model's"):
        generator.update_weights((name, tensor) for name, tensor in new.items() if "layers.1.mlp.up_proj" not in name)
    with pytest.raises(UserError, match=r"no weight named 'model\.lost'"):
        generator.update_weights({**new, "model.lost": torch.zeros(1)}.items())
    with pytest.raises(UserError, match="has shape"):
        generator.update_weights({**new, "lm_head.weight": torch.zeros(3, 3)}.items())
    sampling = Sampling(max_new_tokens=16)
    generator.update_weights(new.items())
    assert [row[0] for row in tokens(generator.generate(PROMPTS, sampling))] == greedy_of_transformers(folders[1], 16)
    generator.reload(folders[0])
    assert [row[0] for row in tokens(generator.generate(PROMPTS, sampling))] == greedy_of_transformers(folders[0], 16)


def test_a_vllm_server_killed_at_work_gives_the_same_results(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the server while requests are under way, once more of its engine alone; then the engine is stopped behind a healthy server."""
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 5.0)
    if not isinstance(generator, VllmGenerator):
        pytest.skip("no server")
    asked, sampling = [Request((5, 6, place + 7), place) for place in range(60)], Sampling(temperature=1.0, max_new_tokens=100)
    expected, found = (dict[int, tuple[int, ...]]() for _ in range(2))
    generator.generate_requests(asked, sampling, lambda request, done: expected.update({request.place: done.tokens}))
    for victim, sent in (("api_server", signal.SIGKILL), ("EngineCore", signal.SIGKILL), ("EngineCore", signal.SIGSTOP)):
        (server,) = generator.servers
        assert server.process is not None
        below = psutil.Process(server.process.pid).children(recursive=True)
        chosen = next(each for each in below if victim in " ".join(each.cmdline()) or victim in each.name())
        starts, threads = server.starts, []

        def keep(request: Request, done: Completion, threads: list[threading.Thread] = threads, pid: int = chosen.pid, sent: int = sent) -> None:
            found[request.place] = done.tokens
            if not threads:
                threads.append(threading.Thread(target=os.kill, args=(pid, sent)))
                threads[0].start()

        found.clear()
        began = time.monotonic()
        generator.generate_requests(asked, sampling, keep)
        print(f"{victim} {sent.name}: {time.monotonic() - began:.0f} s")
        assert server.starts == starts + 1
        assert found == expected
