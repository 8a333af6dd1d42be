"""Packed documents on one GPU: a buffer is its documents run one by one, through our layers in fp32 and through TransformerEngine (thd) in bf16, and
no layer waits for the device to learn where documents end. `python tests/gpu/test_gpu_packed_documents.py` runs the first on a CPU in fp32.
"""

from pathlib import Path

import pytest
import torch
from family_steps import write_all
from packed_rows import ENDS, OPTIONS, Result, boundaries, packed_row, result, rows_apart

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, mcore, parallel
from megatron_prism.engine.model import BuildOptions, build, to_precision
from megatron_prism.kernels.causal_attention import fused
from megatron_prism.planning.layout import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("llama", "mistral", "smollm3", "granite_hybrid", "nemotron_h")
LOCAL = BuildOptions(precision="fp32", layers="local")
ENGINES = {
    "bf16": BuildOptions(precision="bf16", layers="transformer_engine", attention_backend="fused"),
    "bf16 with FlashAttention-4": BuildOptions(precision="bf16", layers="transformer_engine", attention_backend="flash"),
}
if fused.installed() is None:
    del ENGINES["bf16 with FlashAttention-4"]
BOUNDS = {"fp32": (1e-4, 1e-2), "bf16": (2e-3, 1.5e-1)}
"""loss (relative), gradient of one weight (relative, Frobenius norm): those of test_gpu_families"""


def model_of(root: Path, name: str, options: BuildOptions, place: torch.device) -> torch.nn.Module:
    parallel.start(place)
    _, config = families.load(root / name / "hf")
    plan = make_plan(config, ParallelConfig(), 1, OPTIONS.seq_len, global_batch=1, micro_batch=1)
    (chunk,) = build(config, parallel.build_mesh(plan, seed=1), options, place)
    wrapped = to_precision(chunk, chunk.config)
    state = {key: value for key, value in chunk.sharded_state_dict().items() if not key.endswith("_extra_state")}
    chunk.load_state_dict(mcore.load_sharded(state, root / name / "checkpoint" / "sharded"), strict=False)
    return wrapped


def apart(found: Result, expected: Result) -> tuple[float, float]:
    """Of the loss, and of the worst gradient."""
    weights = [name for name in expected if name != "loss"]
    floor = 1e-3 * max(expected[name].norm() for name in weights)
    assert found.keys() == expected.keys()
    worst = max(((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=floor)).item() for name in weights)
    return abs((found["loss"] / expected["loss"]).item() - 1), worst


def check(root: Path, name: str, kinds: dict[str, BuildOptions], place: torch.device) -> None:
    """Each kind against documents one by one under the same kind, and faults, whose gradients are off by 0.57 and more in fp32."""
    for kind, options in kinds.items():
        model = model_of(root, name, options, place)
        row = [packed_row(families.load(root / name / "hf")[1].vocab_size)]
        expected = result(model, rows_apart(families.load(root / name / "hf")[1].vocab_size))
        loss, gradient = apart(result(model, row, boundaries(device=place.type)), expected)
        faults = {fault: apart(result(model, row, boundaries(fault, place.type)), expected)[1] for fault in ENDS}
        faults["all forgotten"] = apart(result(model, row), expected)[1]
        print(
            f"{name} {kind}: loss {loss:.1e}, gradients {gradient:.1e}; faults {', '.join(f'{value:.1e}' for value in faults.values())}", flush=True
        )
        bounds = BOUNDS[kind[:4]]
        assert loss < bounds[0] and gradient < bounds[1], (name, kind, loss, gradient)
        assert min(faults.values()) > bounds[1], (name, kind, faults)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("packed"), NAMES, head_dim=64)  # which FlashAttention-4 has


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_gives_the_loss_and_gradients_of_its_documents(root, name):
    check(root, name, {"fp32": LOCAL, **ENGINES}, device.setup("cuda"))
    parallel.stop()


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", ["llama", "granite_hybrid"])
def test_no_layer_waits_for_the_device(root, name, kind):
    """The second pass, when everything is compiled and every table made; the row and its ends are on the device."""
    place = device.setup("cuda")
    model = model_of(root, name, ENGINES[kind], place)
    tokens, positions, labels, mask = (column.to(place) for column in packed_row(families.load(root / name / "hf")[1].vocab_size))
    packed = boundaries(device="cuda")
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed)
            (losses.float() * mask).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    parallel.stop()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), NAMES)
        for tiny in NAMES:
            check(Path(folder), tiny, {"fp32": LOCAL}, device.setup("cpu"))
    parallel.stop()
