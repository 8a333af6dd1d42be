"""Laws 1, 2 and 3 for every family: logits, loss and each weight's gradient are those of transformers, at every layout, and every bit comes back.

One training step is taken at a learning rate of 1e-30, which moves no weight: Adam's first moment is then (1 - beta1) times the gradient, stored
under the weight's own name and global shape whatever the layout, and the export at the end must equal the Hugging Face folder of the beginning.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_blend import write_tiny_blend
from tiny_models import TINY, write_tiny
from training import VOCAB_SIZE, metrics, run_cases

from megatron_prism import families
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import run_folder, verify, weights
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.sharded import Reader
from megatron_prism.stages import convert

GRADIENT_BOUND = 1e-4
"""largest difference over largest value of one weight's gradient, fp32; measured up to TODO"""
NOTHING_MOVES = {"steps": 1, "optimizer__lr": 1e-30, "optimizer__clip_grad": None, "optimizer__betas": [0.9, 0.95]}
BASE = [name for name in TINY if "tp4" not in name]
HYBRID = [name for name in BASE if name.startswith(("granite_hybrid", "nemotron_h"))]
FOUR = [name for name in TINY if "tp4" in name]
TP, SP, PP = {"parallel.tp": 2}, {"parallel.tp": 2, "parallel.sp": "true"}, {"parallel.pp": 2}
LAYOUTS: dict[int, dict[str, tuple[list[str], dict[str, Any]]]] = {
    1: {"one": (list(TINY), {})},
    2: {"tp": (HYBRID, TP), "tp_sp": (BASE, SP), "pp": (BASE, PP)},
    4: {"tp_sp": (FOUR, {"parallel.tp": 4, "parallel.sp": "true"}), "pp": (HYBRID, {"parallel.pp": 4}), "tp_sp_pp": (HYBRID, {**SP, **PP})},
}
"""ranks -> layout -> the models that try it, and its settings"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every family: NAME/hf as transformers writes it, and NAME/checkpoint imported from it."""
    root = tmp_path_factory.mktemp("families")
    write_tiny_blend(root / "data", VOCAB_SIZE)
    for name in TINY:
        write_tiny(name, root / name / "hf")
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
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


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
        parts = entry.rule.split(moment / (1 - 0.9), model)
        found |= {part.name: tensor for part, tensor in zip(weights._parts(entry, model), parts, strict=True)}
    return found


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(root, name):
    found = verify.verify(root / name / "checkpoint", root / name / "hf")
    assert 0 <= found.relative < 2e-5, found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_loss_gradients_and_weights_are_those_of_transformers_at_every_layout(root, ranks):
    cases = {
        f"{name} {layout}": {"set": {**settings, "model.checkpoint": str(root / name / "checkpoint")}}
        for layout, (names, settings) in LAYOUTS[ranks].items()
        for name in names
    }
    folder = root / f"ranks_{ranks}"
    run_cases(root, ranks, cases, folder=folder, timeout=1400, **NOTHING_MOVES)
    wrong = {}
    for name in sorted({case.split()[0] for case in cases}):
        loss, expected = reference(root / name / "hf", root / "data")
        for case in (case for case in cases if case.split()[0] == name):
            wrong[case] = differences(folder / case, loss, expected)
            assert same_tensors(root / name / "hf", weights.export_hf(folder / case, root / f"back_{ranks}_{case}"))
    print({case: max(found.items(), key=lambda item: item[1]) for case, found in wrong.items()})
    assert {case: found for case, found in wrong.items() if max(found.values()) > GRADIENT_BOUND} == {}


def differences(run: Path, loss: float, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative differences of the loss and of each weight's gradient."""
    found = gradients(run)
    assert found.keys() == expected.keys()
    (line,) = metrics(run)
    # a key's bias shifts all scores of a query alike where there is no RoPE: its gradient is zero but for rounding, and is held to the others' size
    floor = 1e-3 * max(wanted.abs().max() for wanted in expected.values())
    relative = {name: ((found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=floor)).item() for name, wanted in expected.items()}
    return {"loss": abs(line["loss"] / loss - 1), **relative}


def same_tensors(source: Path, back: Path) -> bool:
    wanted, found = (load_file(folder / "model.safetensors") for folder in (source, back))
    return wanted.keys() == found.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
