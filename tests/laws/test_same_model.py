"""Law 2, on the training side: the loss and the gradients of our step are those of transformers on the same weights and samples.

The logits themselves are compared by `prism convert import --verify` (tests/engine/test_verify.py). fp32; the bound is the rounding of sums.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import TINY_LLAMA, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel, step
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.stages import convert


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "rope_scaling": None}])
def test_loss_and_gradient_norm_of_a_step_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(5)
    config = LlamaConfig.from_dict({**TINY_LLAMA, **changes, "_attn_implementation": "eager"})
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, weight in theirs.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert.run(convert.Config(direction="import", source=tmp_path / "hf", output=tmp_path / "checkpoint"))

    run = loop.build_run(load_recipe(None, recipe(tmp_path, tmp_path / "run", model__checkpoint=str(tmp_path / "checkpoint")), TrainConfig))
    run.log.close()
    report = step.train_step(run.engine, run.data, 0, lr=0.0, weight_decay=0.0)
    batch = run.data.micro_batch(range(8))
    parallel.stop()

    logits = theirs(batch.tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.loss_mask)
    loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    loss.backward()
    norm = torch.stack([weight.grad.double().norm() for weight in theirs.parameters() if weight.grad is not None]).norm()
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
