"""vLLM itself: after the weights of another model were sent to a server that runs, it is the server of that other model, bit for bit.

Slow; runs where PRISM_VLLM_PYTHON names a Python with vLLM. In float32; transformers, loaded from the other model, is the oracle.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_hf import make_tiny_model
from tiny_models import write_tiny

from megatron_prism import generate
from megatron_prism.generate import Completion, Sampling
from megatron_prism.generate.digests import differing
from megatron_prism.generate.transformers_backend import TransformersGenerator
from megatron_prism.generate.vllm_backend import VllmGenerator
from megatron_prism.generate.vllm_server import PYTHON, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with vLLM")]
PREFIX = list(range(3, 90))
"""long enough that vLLM keeps its blocks: what was computed with old weights must not be found by the new"""
PROMPTS = [[*PREFIX, token] for token in (5, 6, 7)] + [[9, 4], [8]]
SAMPLING = Sampling(max_new_tokens=16)
CLOSE, CLOSE_TO_TRANSFORMERS = 1e-5, 1e-3
"""of a log-probability between two servers of one model, whose batches may differ; and between two implementations"""
MODELS = {
    "llama": lambda folder, seed: make_tiny_model(folder, seed=seed, hidden_size=128),  # heads of 32, which vLLM's attention on a CPU knows
    # its output layer is the embedding: vLLM's own reload leaves it as it was packed for the CPU
    "granite": lambda folder, seed: write_tiny("granite", folder, seed=seed, hidden_size=128),
}


@contextmanager
def opened(folder: Path) -> Iterator[VllmGenerator]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
            patch.setenv(name, value)
        settings: dict[str, Any] = {"server_flags": {"enforce-eager": True, "enable-prefix-caching": True}, "start_timeout_seconds": 900}
        with generate.load(folder, "vllm", batch_size=8, **settings) as found:
            assert isinstance(found, VllmGenerator)
            yield found


def written(generator: VllmGenerator) -> list[Completion]:
    return [row[0] for row in generator.generate(PROMPTS, SAMPLING)]


def assert_same(found: list[Completion], expected: list[Completion], bound: float) -> None:
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    differences = [np.abs(np.subtract(one.logprobs, two.logprobs)).max() for one, two in zip(found, expected, strict=True)]
    print(f"largest difference of a log-probability: {max(differences):.1e}")
    assert max(differences) <= bound


@pytest.mark.parametrize("name", MODELS)
def test_a_server_that_was_given_new_weights_is_a_server_started_from_them(name: str, tmp_path: Path) -> None:
    """Killed after two updates it starts from what it was given last, whose bits are those of the truth: that start is the other server."""
    old, between, new = (MODELS[name](tmp_path / str(seed), seed) for seed in (3, 5, 4))
    tensors: dict[str, torch.Tensor] = load_file(new / "model.safetensors")
    with opened(old) as generator:
        before, checksums_before = written(generator), generator.weight_checksums()
        generator.update_weights(load_file(between / "model.safetensors").items(), version=11)
        assert {each.weights_version for each in written(generator)} == {11}
        generator.update_weights(tensors.items(), version=12)
        found, checksums, (server,) = written(generator), generator.weight_checksums(), generator.servers
        assert {each.weights_version for each in found} == {12} and server.starts == 1
        assert [each.tokens for each in found] != [each.tokens for each in before] and checksums != checksums_before
        kept = load_file(server.folder / "model.safetensors")
        assert differing(tensors.items(), kept) == [] and kept.keys() == tensors.keys()
        kill(server)
        expected = written(generator)
        assert server.starts == 2 and generator.weight_checksums() == checksums
        assert {each.weights_version for each in expected} == {12}
        assert_same(found, expected, CLOSE)
    with TransformersGenerator.load(new) as oracle:
        assert_same(found, [row[0] for row in oracle.generate(PROMPTS, SAMPLING)], CLOSE_TO_TRANSFORMERS)


def kill(server: Server) -> None:
    assert server.process is not None
    below = psutil.Process(server.process.pid).children(recursive=True)
    os.kill(next(each.pid for each in below if "api_server" in " ".join(each.cmdline())), signal.SIGKILL)
