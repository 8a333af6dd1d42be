"""One training step that moves nothing, for every tiny family: its loss and gradients by Hugging Face name, ours and transformers'.

At a learning rate of 1e-30 no weight moves, and Adam's first moment is (1 - beta1) times the gradient, stored under the weight's own name and global
shape whatever the layout.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny_blend import write_tiny_blend
from tiny_models import TINY, write_tiny
from training import VOCAB_SIZE

from megatron_prism import families
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import run_folder, verify, weights
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.sharded import Reader
from megatron_prism.stages import convert

BETA1 = 0.9
NOTHING_MOVES = {"steps": 1, "optimizer__lr": 1e-30, "optimizer__clip_grad": None, "optimizer__betas": [BETA1, 0.95]}


def write_all(root: Path, names: Iterable[str] = TINY, **changes: Any) -> Path:
    """Of every family, or those named: NAME/hf as transformers writes it, NAME/checkpoint imported from it; `data`, the blend of a `recipe`.

    changes: other config.json keys.
    """
    write_tiny_blend(root / "data", VOCAB_SIZE)
    for name in names:
        write_tiny(name, root / name / "hf", **changes)
        convert.run(convert.Config(direction="import", source=root / name / "hf", output=root / name / "checkpoint"))
    return root


def reference(hf: Path, data: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first global batch under transformers, by Hugging Face name."""
    model = verify.transformers_model(hf, attn_implementation="eager")
    model.get_input_embeddings().padding_idx = None  # torch would leave out the gradient of that row's input side
    batch = SampleReader(load_blend(data), "train", 32, mask_end_of_document=True).micro_batch(range(8))
    logits = model(batch.tokens, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.loss_mask)
    loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    loss.backward()
    return loss.item(), reference_gradients(model)


def reference_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a backward pass left in a model of transformers, by the names in its file."""
    prefix = "backbone." if model.config.model_type == "nemotron_h" else "model."  # transformers renames that family's files when it reads them
    found = {name.replace("model.", prefix, 1): weight.grad for name, weight in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Gradients of a run's only step, by Hugging Face name, out of Adam's first moments."""
    folder = run_folder.newest(run)
    assert folder is not None
    family, model = families.load(folder / "hf")
    reader = Reader(folder / "sharded")
    names, found = weights.MegatronNames(reader, family, model), {}
    for entry in family.rules(model):
        key, stacked = names.place(entry)
        rows = [slice(0, entry.rule.shape(model)[0])] if entry.rule.padded else []
        moment = reader.read(f"optimizer.state.exp_avg.{key}", *([entry.layer] if stacked else []), *rows)
        parts = entry.rule.split(moment / (1 - BETA1), model)
        found |= {part.name: tensor for part, tensor in zip(entry.parts(model), parts, strict=True)}
    return found
