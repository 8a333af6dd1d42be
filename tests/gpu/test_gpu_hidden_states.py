"""Hidden states of tiny models on one GPU, with TransformerEngine's layers and the fused kernels, against transformers in fp32 on the CPU."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.analysis.hidden_states import Precision, open_transformers
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import hidden_states
from megatron_prism.planning.layout import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("leave_groups"),
]

LENGTHS = (3, 17, 1, 9, 30)
BOUNDS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 5e-2}
"""of a layer, relative, Frobenius norm; mamba-ssm's scan is TF32 in fp32 too; in bf16 on a CPU up to 1.5e-2"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "granite", "granite_hybrid", "nemotron_h"])
def test_states_are_those_of_transformers_on_the_cpu(tmp_path: Path, name: str, precision: Precision):
    folder = write_tiny(name, tmp_path / "hf")
    plan = make_plan(families.load(folder)[1], ParallelConfig(), 1, seq_len=1, global_batch=1, micro_batch=1)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in LENGTHS]
    with open_transformers(folder, "fp32", "cpu") as model:
        expected = model.pooled(ids, 64, lambda count: None)
    with hidden_states.open_engine(folder, plan, precision, "cuda") as engine:
        found = engine.pooled(ids, 64, lambda count: None)
    assert expected is not None and found is not None
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]
    print(f"{name} {precision}: {max(errors):.1e}", flush=True)
    assert max(errors) < BOUNDS[precision]
