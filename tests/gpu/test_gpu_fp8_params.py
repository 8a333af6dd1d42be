"""`fp8.params`: weights in FP8 alone train as weights in bf16 that are cast to FP8, bit for bit, and a checkpoint does not tell which it was.

Clipping is off where bits are compared: the gradients' norm sums the same squares in another order.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from training import VOCAB_SIZE, differing, final_state, from_random, metrics, recipe, run_cases

from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, loop, run_folder
from megatron_prism.engine.fp8_params import is_fp8
from megatron_prism.engine.optimizer_state import own_state
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import FaultyMachineError
from megatron_prism.kernels.fp8_cast import fp8_cast, largest, scales_of

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus == 0, reason="needs a CUDA device"), pytest.mark.usefixtures("leave_groups")]

SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
HYBRID: dict[str, Any] = {"hidden_size": 128, "mamba_n_heads": 16, "vocab_size": VOCAB_SIZE}
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "precision": "bf16",
    "fp8__recipe": "tensorwise",
    "deterministic": True,
    "optimizer__lr": 1e-3,
    "optimizer__clip_grad": None,
    "steps": 6,
    "checkpoint__save_interval": 3,
    "checkpoint__keep_last": 10,
    "validation__interval": 3,
}
SMALL: dict[str, Any] = {"optimizer__moments": "bf16", "optimizer__split_master": "true", "optimizer__gradients": "bf16"}
PARAMS = {"plain": "false", "params": "true"}
SHARED = Path(__file__).parents[1] / "laws" / "shared_gpu_runs.py"


@pytest.mark.parametrize("cut", [1, 5000, 6 * 512 * 1024 - 7], ids=str)
def test_ranges_of_masters_become_the_fp8_that_transformer_engine_makes_of_the_whole_weight(cut):
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    torch.manual_seed(cut)
    shape = (6 * 512, 1024)
    for size in (1e-30, 1e-3, 1.0, 1e5, 0.0):
        master = torch.randn(shape, device="cuda") * 10.0 ** torch.randint(-4, 2, shape, device="cuda") * size
        expected = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, torch.device("cuda"))(master.bfloat16())
        data = torch.full(shape, 99, dtype=torch.uint8, device="cuda")
        ranges = [master.view(-1)[:cut], master.view(-1)[cut:]]
        scales, inverses = scales_of(largest(ranges).amax().view(1))
        for part, place in zip(ranges, (data.view(-1)[:cut], data.view(-1)[cut:]), strict=True):
            fp8_cast(part, scales[0], place, impl="fused")
        assert torch.equal(inverses, expected._scale_inv), size
        assert torch.equal(data, expected._data), (size, int((data != expected._data).sum()))


def hybrid(root: Path) -> dict[str, str]:
    folder = root / "hybrid"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**TINY["granite_hybrid"], **HYBRID}))
        (folder / "tokenizer.json").write_text("{}")
    return {"model__hf_config": str(folder), "model__tokenizer": str(folder)}


def with_and_without(kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Cases of `run_cases`: each kind's settings with every value of `fp8.params`."""
    return {f"{kind} {name}": {"set": {**settings, "fp8__params": value}} for kind, settings in kinds.items() for name, value in PARAMS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense and hybrid, with and without; and, of the dense ones, each gone on from the other's third step."""
    root = tmp_path_factory.mktemp("fp8_params")
    dense = from_random(root, **SHAPE)
    ends = {"fp8__bf16_layers_at_start": 1, "recompute": "full"}
    kinds: dict[str, dict[str, Any]] = {
        "dense": dense,
        "small": {**dense, **SMALL, "micro_batch": 2},
        "ends": {**dense, **ends},
        "hybrid": hybrid(root),
    }
    run_cases(root, 1, with_and_without(kinds), folder=root / "runs", **SETTINGS)
    (root / "resumed").mkdir()
    for name in PARAMS:
        run = root / "resumed" / name
        shutil.copytree(root / "runs" / f"dense {name}", run)
        (run / "COMPLETE").unlink()
        checkpoint.remove(run_folder.step_folder(run, 6))
    other = {"plain": "true", "params": "false"}
    run_cases(root, 1, {name: {"set": {**dense, "fp8__params": other[name]}} for name in PARAMS}, folder=root / "resumed", **SETTINGS)
    return root / "runs", root / "resumed"


def same(found: Path, expected: Path) -> None:
    """Losses, and everything of the last checkpoint: names, types, shapes, bits."""
    assert [line["loss"] for line in metrics(found)] == [line["loss"] for line in metrics(expected)]
    ours, theirs = final_state(found), final_state(expected)
    assert differing(ours, theirs) == []
    assert {name: (x.dtype, x.shape) for name, x in ours.items() if torch.is_tensor(x)} == {
        name: (x.dtype, x.shape) for name, x in theirs.items() if torch.is_tensor(x)
    }


@pytest.mark.parametrize("kind", ["dense", "ends", "hybrid"])
def test_a_run_with_weights_in_fp8_is_the_run_without_bit_for_bit(runs, kind):
    same(runs[0] / f"{kind} params", runs[0] / f"{kind} plain")
    lines = [json.loads(line) for line in (runs[0] / f"{kind} params" / "metrics.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (runs[0] / f"{kind} plain" / "metrics.jsonl").read_text().splitlines()]
    held_out = [{key: value for key, value in line.items() if "validation" in key} for line in lines]
    assert any(held_out) and held_out == [{key: value for key, value in line.items() if "validation" in key} for line in plain]


def test_split_masters_differ_by_ties_of_rounding_alone(runs):
    """A split master's bf16 half rounds ties away from zero, a whole master's to even: the first losses are the same, the last ones near."""
    nearly_same(*(runs[0] / f"small {name}" for name in PARAMS))


def nearly_same(*runs: Path) -> None:
    """The first loss, and the others within a thousandth."""
    found, expected = map(metrics, runs)
    assert len(found) == SETTINGS["steps"] and found[0]["loss"] == expected[0]["loss"]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True)) < 1e-3


@pytest.mark.parametrize("name", list(PARAMS))
def test_a_checkpoint_goes_on_with_weights_in_fp8_and_without_bit_for_bit(runs, name):
    same(runs[1] / name, runs[0] / "dense plain")


def trained(root: Path, name: str, look: Callable[[Any], None], **settings: Any) -> Path:
    """A run in this process that somebody looks at before its third step."""
    values = {**SETTINGS, "fp8__params": True, "steps": 4, "checkpoint__save_interval": 2, **from_random(root, **SHAPE), **settings}
    cfg = load_recipe(None, recipe(root, root / name, **values), TrainConfig)
    usual = loop._step

    def after_looking(run: Any) -> Any:
        if run.progress.step == 2:
            look(run)
        return usual(run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_step", after_looking)
        return loop.train(cfg)


def test_after_a_step_every_weight_and_its_transpose_are_those_of_transformer_engine_s_quantizer(tmp_path):
    seen = []

    def look(run: Any) -> None:
        checkpoint.gather_weights(run.engine)
        for part, weight, start, stop in own_state(run.engine.optimizer):
            if is_fp8(weight):
                (owned,) = [one for one in part.optimizer.fp8.owned if one.data.data_ptr() == weight._data.data_ptr() + start]
                assert (start, stop) == (0, weight.numel()), "one rank owns all"
                expected = weight._quantizer(owned.master.bfloat16().view(weight.shape))
                seen.append(torch.equal(weight._data, expected._data) and torch.equal(weight._scale_inv, expected._scale_inv))
                seen.append(torch.equal(weight._transpose, weight._data.t().contiguous()))

    trained(tmp_path, "run", look)
    assert len(seen) == 2 * 4 * 4 and all(seen), seen


@pytest.mark.parametrize(
    ("of", "what"),
    [
        ("data", "the weights that it updates"),
        ("master", "its master weights, moments or FP8 scales"),
        ("scale", "its master weights, moments or FP8 scales"),
    ],
)
def test_a_flipped_bit_of_an_fp8_weight_or_its_master_is_found(tmp_path, of, what):
    def flip(run: Any) -> None:
        weights = run.engine.optimizer.chained_optimizers[0].optimizer.fp8
        tensor = weights.inverses[1] if of == "scale" else getattr(weights.owned[1], of)
        tensor.view(torch.int8)[2] ^= 1

    with pytest.raises(FaultyMachineError, match=rf"step 3: memory changed since the last update.*: {what}\)"):
        trained(tmp_path, "run", flip, check_memory=True)


def test_a_start_from_weights_takes_them_as_bf16_masters(runs, tmp_path):
    """As a run does that keeps bf16 weights: the same first loss, the same bits later."""
    load = {"model__checkpoint": str(runs[0] / "dense params"), "model__load": "weights"}
    found = run_cases(tmp_path, 1, {name: {"set": {**load, "fp8__params": value}} for name, value in PARAMS.items()}, **{**SETTINGS, "steps": 3})
    assert found["params"][0]["loss"] == found["plain"][0]["loss"]
    same(tmp_path / "runs_1_0" / "params", tmp_path / "runs_1_0" / "plain")


TP: dict[str, Any] = {"parallel__tp": 2, "parallel__sp": "true"}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dp": {"dp": {}, "small": SMALL, "ends": {"fp8__bf16_layers_at_start": 1}},
    "cp": {"cp": {"parallel__cp": 2}},
    "pp": {"pp": {"parallel__pp": 2}},
    "tp": {"tp": TP, "hybrid": TP},
}
"""launches, and the runs in each"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a launch's runs, with and without, over two ranks that share this GPU."""
    root = tmp_path_factory.mktemp("two_ranks")
    starts = {"hybrid": hybrid(root)}
    dense = from_random(root, **SHAPE)

    def runs(launch: str) -> Path:
        folder = root / launch
        if not folder.exists():
            run_cases(
                root,
                2,
                with_and_without({name: {**starts.get(name, dense), **more} for name, more in LAYOUTS[launch].items()}),
                folder=folder,
                script=SHARED,
                **SETTINGS,
            )
        return folder

    return runs


@pytest.mark.parametrize("layout", [*LAYOUTS, "ends", "hybrid"])
def test_two_ranks_that_share_masters_and_gather_fp8_are_two_ranks_with_bf16_weights_bit_for_bit(two_ranks, layout):
    folder = two_ranks({"ends": "dp", "hybrid": "tp"}.get(layout, layout))
    same(folder / f"{layout} params", folder / f"{layout} plain")


def test_two_ranks_with_split_masters_differ_by_ties_of_rounding_alone(two_ranks):
    nearly_same(*(two_ranks("dp") / f"small {name}" for name in PARAMS))
