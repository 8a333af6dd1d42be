"""A replay that looks at every tensor: it finds what is there, and nothing where nothing is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_steps_plants import activation, gradient, gradient_of_output, layer_of, weight
from tiny_models import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from training import recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, origin
from megatron_prism.engine.model import unwrap
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.step import forward_backward

pytestmark = pytest.mark.usefixtures("leave_groups")
PACKED = {"data__packing__pad_multiple": 4, "data__packing__over_length": "split", "data__packing__window_documents": 20}


def built(root: Path, model: str, **settings: Any) -> Any:
    """A run of a model of TINY, before its first step."""
    folder = root / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY[model]))
    (folder / "tokenizer.json").write_text("{}")
    given = {"model__hf_config": str(folder), "model__tokenizer": str(folder), "global_batch": 2, **settings}
    return loop.build_run(load_recipe(None, recipe(root, root / "run", **given), TrainConfig))


def found(run: Any) -> origin.Origin:
    try:
        return origin.find(run.engine, lambda: forward_backward(run.engine, run.data, 0, forward_only=False))
    finally:
        run.close()


GOOD: dict[str, dict[str, Any]] = {
    "granite_hybrid": {"recompute": "full"},
    "nemotron_h": {},
    "mistral": {"recompute": "full", "keep_attention": True},
    "granite": {"precision": "bf16", **PACKED},
}


@pytest.mark.parametrize("model", list(GOOD))
def test_nothing_is_found_where_every_number_is_finite_and_gradients_are_those_of_a_step(tmp_path, model):
    run = built(tmp_path, model, **GOOD[model])
    gradients = []
    for _ in range(2):
        for chunk in run.engine.model:
            chunk.zero_grad_buffer()
        if not gradients:
            forward_backward(run.engine, run.data, 0, forward_only=False)
        else:
            seen = origin.find(run.engine, lambda: forward_backward(run.engine, run.data, 0, forward_only=False))
            assert (seen.repeated, seen.sights, seen.gradients, seen.weights) == (False, [], {}, {}) and seen.largest is not None
        gradients.append([weight.main_grad.clone() for weight in unwrap(run.engine.model[0]).parameters()])
    assert all(torch.equal(with_hooks, without) for without, with_hooks in zip(*gradients, strict=True))
    hooks = [hook for module in run.engine.model[0].modules() for hook in (module._forward_hooks, module._forward_pre_hooks) if hook]
    assert not hooks, "hooks were left behind"
    source, documents = run.data.documents(1)
    assert source in ("code", "math") and documents == sorted(set(documents), key=documents.index) and documents
    run.close()


@pytest.mark.parametrize(
    ("plant", "what", "module", "words"),
    [
        (activation(2, "mixer", 0, value=torch.inf), "activation", "decoder.layers.2.mixer", "infinity first in the forward pass of micro-batch 0"),
        (gradient(2, "mixer.out_proj", 0), "weight gradient", "decoder.layers.2.mixer.out_proj.weight", "NaN first in the backward pass"),
        (gradient_of_output(2, "mixer", 0), "gradient", "decoder.layers.2.mixer", "gradient of the output of decoder.layers.2.mixer"),
        (weight(0, "mixer.in_proj", 0), "activation", "decoder.layers.0.mixer.in_proj", "whose weight is no number already"),
    ],
)
def test_a_hybrid_s_mixer_is_named_by_its_layer(tmp_path, plant, what, module, words):
    run = built(tmp_path, "nemotron_h")
    plant(run)
    seen = found(run)
    assert (seen.sights[0].what, seen.sights[0].module) == (what, module)
    assert seen.micro_batches == [0, 1] and seen.repeated and words in seen.describe()


def test_gradients_whose_squares_pass_fp32_are_told_with_the_largest(tmp_path):
    run = built(tmp_path, "llama")
    layer_of(run, 2).mlp.linear_fc2.weight.register_hook(lambda gradient: gradient * 1e30)
    seen = found(run)
    assert seen.repeated and not seen.sights and not seen.gradients
    assert "the largest" in seen.describe() and "decoder.layers.2.mlp.linear_fc2.weight on rank 0" in seen.describe()


def test_gradients_that_no_hook_sees_are_found_before_ranks_are_summed(tmp_path):
    """As kernels leave them that add a weight's gradient to the buffer themselves."""
    run = built(tmp_path, "llama")
    spoilt = layer_of(run, 3).mlp.linear_fc1.weight

    def spoil(_: Any) -> None:
        spoilt.main_grad.view(-1)[3] = torch.nan

    layer_of(run, 0).mlp.linear_fc1.weight.register_post_accumulate_grad_hook(spoil)
    seen = found(run)
    assert seen.gradients == {0: ["decoder.layers.3.mlp.linear_fc1.weight"]} and not seen.sights
    assert "the gradients of decoder.layers.3.mlp.linear_fc1.weight are not finite on rank 0" in seen.describe()


def test_a_stand_in_for_a_gradient_that_a_kernel_added_itself_is_not_looked_at(tmp_path):
    run = built(tmp_path, "llama")
    linear = layer_of(run, 1).mlp.linear_fc1
    linear.register_forward_hook(lambda *_: setattr(linear.weight, "grad_added_to_main_grad", True))
    linear.weight.register_hook(lambda gradient: gradient * torch.nan)
    seen = found(run)
    assert not seen.sights and not seen.gradients and not seen.repeated
    assert "That tells no cause" in seen.describe(), "a replay that is finite says nothing of the machine"
    assert "Sums had a fixed order (deterministic=true), so that a device or memory" in replace(seen, fixed_order=True).describe()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.numel() * made.element_size())
        return made


def test_the_account_of_a_tensor_is_that_of_its_places_and_takes_no_more_room_than_the_tensor():
    """A device that training fills has no room for a list of places, 8 bytes a dimension and number."""
    torch.manual_seed(1)
    tensor = torch.randn(5, 7, 11).bfloat16().transpose(0, 1)
    tensor[6, 2, 3], tensor[2, 4, 1], tensor[2, 1, 9] = torch.nan, torch.inf, -torch.inf
    with Largest() as made:
        place, count, value, largest = origin.account(tensor)
    wrong = ~tensor.isfinite()
    assert (place, count, value) == (wrong.nonzero()[0].tolist(), 3, float(tensor[2, 1, 9])) == ([2, 1, 9], 3, -torch.inf)
    assert largest == float(tensor[~wrong].abs().max())
    assert made.size <= tensor.numel() * tensor.element_size()
    assert origin.account(torch.full((2, 3), torch.nan))[:2] == ([0, 0], 6) and origin.account(torch.full((2, 3), torch.nan))[3] is None
