"""Others read our exports as the same model: fp32 log-probabilities of a prompt, over the whole vocabulary, are those of our transformers.

Each reader lives in an environment of its own (vLLM pins a torch), whose Python a variable names; without it, its tests are skipped:
PRISM_VLLM_PYTHON, PRISM_TRANSFORMERS4_PYTHON. docs/convert.md says how they are made and what was found.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, write_tiny

from megatron_prism.engine.verify import without_cuda_kernels
from megatron_prism.stages import convert

VLLM, TRANSFORMERS_4 = "PRISM_VLLM_PYTHON", "PRISM_TRANSFORMERS4_PYTHON"
SCRIPTS = {VLLM: "vllm_loads.py", TRANSFORMERS_4: "transformers_loads.py"}
SIZES = {"hidden_size": 128}
"""vLLM's attention on a CPU knows heads of 32, 64 and more"""
HYBRID = {**SIZES, "mamba_d_head": 32}
NEMOTRON = {**SIZES, "head_dim": 32, "time_step_min": 1e-9, "time_step_max": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "granite": SIZES,
    "granite_dense": HYBRID,
    "granite_hybrid": HYBRID,
    "smollm3": SIZES,
    "nemotron_h": NEMOTRON,
}
EXTENSIONS: dict[str, dict[str, Any]] = {
    "theta": {"theta": 1e7},
    "ntk": {},
    "linear": {},
    "yarn": {"beta_fast": 4.0},
    "llama3": {"factor": 4.0},
}
TOLERANCE = 1e-4
"""of a log-probability: fp32 over 4 to 8 layers; found: at most 6e-5"""


def needs(reader: str) -> list[pytest.MarkDecorator]:
    """Slow (half a minute each), and skipped without the reader."""
    return [pytest.mark.slow, pytest.mark.skipif(reader not in os.environ, reason=f"{reader} names no Python to read the export with")]


def cases(function: Callable[..., None]) -> Callable[..., None]:
    """A test of every family under every reader that knows it."""
    pairs = [(reader, name) for reader in SCRIPTS for name in CASES if (reader, name) != (TRANSFORMERS_4, "nemotron_h")]
    found: Callable[..., None] = pytest.mark.parametrize(("reader", "name"), [pytest.param(*pair, marks=needs(pair[0])) for pair in pairs])(function)
    return found


def export(name: str, root: Path, new_form: bool = False, **changes: Any) -> Path:
    """A tiny model through `prism convert import` and `export`; new_form: its config as transformers 5 writes it."""
    from transformers import AutoConfig

    source = write_tiny(name, root / "hf", **changes)
    if new_form:
        AutoConfig.from_pretrained(source).save_pretrained(source)
    convert.run(convert.Config(direction="import", source=source, output=root / "checkpoint"))
    return convert.run(convert.Config(direction="export", source=root / "checkpoint", output=root / "export"))


def difference(reader: str, folder: Path, name: str) -> float:
    """Largest difference of a log-probability between a reader and transformers, over 60 tokens, more than any window or chunk here."""
    from transformers import AutoModelForCausalLM

    vocab_size = TINY[name]["vocab_size"]
    prompt = torch.randint(3, vocab_size, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    command = ["nice", "-n", "15", os.environ[reader], str(Path(__file__).with_name(SCRIPTS[reader])), str(folder), *map(str, prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    found = torch.tensor(answer["log_probabilities"])
    with without_cuda_kernels(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = model(torch.tensor([prompt])).logits.log_softmax(-1)[0, :-1]
    assert found.shape == expected.shape == (59, vocab_size)
    worst = float((found - expected).abs().max())
    print(f"{name}, {reader} {answer['version']}: {worst:.1e}")
    return worst


@cases
def test_an_export_is_the_same_model_for_others(reader, name, tmp_path):
    assert difference(reader, export(name, tmp_path, **CASES[name]), name) < TOLERANCE


@cases
def test_also_in_bf16_with_a_config_that_transformers_5_wrote(reader, name, tmp_path):
    assert difference(reader, export(name, tmp_path, new_form=True, dtype=torch.bfloat16, **CASES[name]), name) < TOLERANCE


@pytest.mark.parametrize("reader", [pytest.param(reader, marks=needs(reader)) for reader in SCRIPTS])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_an_extended_model_is_the_same_for_others_beyond_its_old_length(reader, kind, tmp_path):
    """From 32 to 128 positions, over 60 tokens: config.json with a change of rotary embeddings, as `prism extend` writes it."""
    from megatron_prism import families
    from megatron_prism.families.extension import Extension, RopeChange, extended

    before = {**TINY["llama"], **SIZES, "rope_scaling": None, "max_position_embeddings": 32}
    model = families.find(before).model_config(before)
    after = extended(before, model, Extension(128, rope=RopeChange(kind=kind, **EXTENSIONS[kind])))
    assert difference(reader, export("llama", tmp_path, **after), "llama") < TOLERANCE


@pytest.mark.parametrize("reader", [pytest.param(VLLM, marks=needs(VLLM))])
def test_vllm_knows_no_lower_limit_of_nemotron_h_time_steps(reader, tmp_path):
    """A limit of vLLM, and the proof that this comparison can fail: transformers raises steps below time_step_min, here 0.1, to it."""
    changes = {**NEMOTRON, "time_step_min": 0.1, "time_step_max": 0.4}
    assert difference(reader, export("nemotron_h", tmp_path, **changes), "nemotron_h") > 0.1
