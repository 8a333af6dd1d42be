"""transformers as a baseline: the two conventions of training, and Liger's functions in place for its own steps alone."""

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training import write_model_files
from transformers.models.llama import modeling_llama

from megatron_prism.engine import device, parallel
from megatron_prism.engine.bench import hugging_face
from megatron_prism.engine.bench.cases import Config, resolve
from megatron_prism.errors import UserError

TRANSFORMERS_ROPE = modeling_llama.apply_rotary_pos_emb
calls: list[str] = []


def ligers_rope(*args, **kwargs):
    calls.append("rope")
    return TRANSFORMERS_ROPE(*args, **kwargs)


def ligers_forward(module, x):
    calls.append("norm")
    return type(module).forward(module, x)


ligers_forward.__module__ = "liger_kernel.transformers.rms_norm"
ligers_forward.__qualname__ = "LigerRMSNorm.forward"


def patch_llama(model):
    """As Liger does it: a function of the module, and the forward pass of modules that are there."""
    modeling_llama.apply_rotary_pos_emb = ligers_rope
    for layer in model.model.layers:
        layer.input_layernorm.forward = ligers_forward.__get__(layer.input_layernorm)


@pytest.fixture
def case(tmp_path: Path):
    write_model_files(tmp_path / "model", num_hidden_layers=2)
    train = {"data": {"seq_len": 32}, "device": "cpu", "precision": "bf16"}
    (found,) = resolve(Config(output=tmp_path / "out", model=str(tmp_path / "model"), micro_batches=2, train=train), 1, tmp_path / "work")
    place = device.setup("cpu")
    parallel.start(place)
    yield found, parallel.build_mesh(found.plan, 1), place
    parallel.stop()


def stand_in(monkeypatch, patch) -> None:
    """A package of Liger's name, which needs CUDA, with functions of transformers behind its own."""
    module = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib, "metadata", SimpleNamespace(version=lambda name: "9.9"))
    calls.clear()


@pytest.mark.parametrize(("kind", "weights"), [(hugging_face.TransformersLoop, torch.bfloat16), (hugging_face.AutocastLoop, torch.float32)])
def test_weights_and_moments_have_the_type_that_the_row_says_and_products_are_in_bf16(case, kind, weights):
    side = kind(*case)
    products = set()
    side.plain.lm_head.register_forward_hook(lambda module, args, output: products.add(output.dtype))
    side.step()
    states = [value for state in side.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {tensor.dtype for tensor in (*side.plain.parameters(), *states)} == {weights}
    assert products == {torch.bfloat16}
    assert [word for word in ("bf16, no fp32 masters", "fp32 weights") if word in side.notes[0]] == (
        ["bf16, no fp32 masters"] if weights == torch.bfloat16 else ["fp32 weights"]
    )
    assert side.loss() == pytest.approx(4.6, abs=0.3)  # ln(97)


def test_ligers_functions_are_in_place_in_its_own_steps_alone_and_its_row_names_them(case, monkeypatch):
    stand_in(monkeypatch, patch_llama)
    liger, plain = hugging_face.LigerLoop(*case), hugging_face.TransformersLoop(*case)
    assert modeling_llama.apply_rotary_pos_emb is TRANSFORMERS_ROPE
    plain.step()
    assert calls == []
    liger.step()
    assert calls.count("rope") == calls.count("norm") == 2 * 2  # layers, micro-batches
    assert modeling_llama.apply_rotary_pos_emb is TRANSFORMERS_ROPE
    assert "Liger 9.9 in place: 2 LigerRMSNorm, apply_rotary_pos_emb" in liger.notes


def test_liger_that_replaces_nothing_is_refused(case, monkeypatch):
    stand_in(monkeypatch, lambda model: None)
    with pytest.raises(UserError, match=r"liger-kernel 9\.9 has replaced nothing in LlamaForCausalLM"):
        hugging_face.LigerLoop(*case)
