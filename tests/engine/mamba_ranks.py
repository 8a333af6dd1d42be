"""One Mamba layer on four ranks (tp=2 beside dp=2, and tp=4): outputs, decoding, packed documents and every gradient against what one rank found.

    torchrun --nproc-per-node 4 mamba_ranks.py FOLDER      (FOLDER as `write_expected` leaves it)

Every rank prints nothing and exits with an error where a difference exceeds BOUND, or where a planted fault goes unseen.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prism.engine import device, mamba, mcore, parallel, saving
from megatron_prism.engine.attention import RMSNorm
from megatron_prism.engine.optimizer_state import sharded_slices
from megatron_prism.families.model_config import MambaConfig
from megatron_prism.planning.layout import ParallelPlan

Tensors = dict[str, torch.Tensor]
HIDDEN, LENGTH, BATCH = 16, 12, 2
CASES = {"one_group": (1, 1), "two_groups": (2, 2), "four_groups": (4, 4), "one_norm_group": (4, 1)}
"""name -> groups of B and C, groups of the norm"""
DOCUMENTS = (0, 5, 6, 12)
PIECES = (7, 1, 1, 3)
"""tokens fed at a time when decoding"""
BOUND, FAULT = 3e-6, 1e-3
"""largest difference over largest value, fp32: ranks sum in another order, measured up to 4e-7; what a fault must exceed, measured from 5e-3"""


def sizes(groups: int, norm_groups: int, **changes: Any) -> MambaConfig:
    kept = {"num_heads": 8, "head_dim": 4, "state_dim": 4, "conv_kernel": 4, "chunk_size": 5}
    return MambaConfig(**{**kept, "num_groups": groups, "norm_groups": norm_groups, **changes})


def mesh(tp: int) -> parallel.Mesh:
    parallel.start(device.setup("cpu"))
    dp = parallel.world_size() // tp  # data-parallel ranks get the same data, so that their mean is one rank's gradient
    plan = ParallelPlan(tp=tp, pp=1, vpp=None, cp=1, dp=dp, sp=False, micro_batch=1, num_microbatches=1, padded_vocab_size=8)
    return parallel.build_mesh(plan, seed=3)


def layer(block: MambaConfig, place: parallel.Mesh) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        tensor_model_parallel_size=place.plan.tp,
        sequence_parallel=place.plan.sp,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = mamba.mixer_spec(False, block, place.plan.tp, norm=RMSNorm, bias_dropout_add=get_bias_dropout_add)
    return build_module(spec, config=config, layer_number=1, pg_collection=place.groups)


def randomise(module: torch.nn.Module) -> None:
    """Move every parameter away from ones and zeros."""
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)


def checkpoint(module: torch.nn.Module, place: parallel.Mesh) -> dict[str, Any]:
    state = module.sharded_state_dict(prefix="decoder.layers.0.", metadata={"dp_cp_group": place.groups.dp_cp})
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def load(module: torch.nn.Module, place: parallel.Mesh, folder: Path) -> torch.nn.Module:
    loaded = mcore.load_sharded(checkpoint(module, place), folder)
    module.load_state_dict({key.removeprefix("decoder.layers.0."): value for key, value in loaded.items()}, strict=True)
    return module


def save(module: torch.nn.Module, place: parallel.Mesh, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    saving.save_sharded(checkpoint(module, place), folder)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cut(x: torch.Tensor, place: parallel.Mesh) -> torch.Tensor:
    """This rank's part of the sequence."""
    return x.chunk(place.plan.tp)[place.tp_rank] if place.plan.sp else x


def whole(x: torch.Tensor, place: parallel.Mesh) -> torch.Tensor:
    """The sequence again; without sequence parallelism every rank must have the same."""
    parts = [torch.empty_like(x) for _ in range(place.plan.tp)]
    dist.all_gather(parts, x.contiguous(), group=place.groups.tp)
    assert place.plan.sp or all(torch.equal(part, parts[0]) for part in parts)
    return torch.cat(parts) if place.plan.sp else parts[0]


def packed(documents: tuple[int, ...]) -> PackedSeqParams:
    ends = torch.tensor(documents, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


@torch.no_grad()
def decoded(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    context, outputs = StaticInferenceContext(BATCH, LENGTH), []
    for piece in hidden.split(PIECES):
        outputs.append(module(piece, inference_context=context))
        context.sequence_len_offset += piece.shape[0]
    return torch.cat(outputs)


def found(module: torch.nn.Module, place: parallel.Mesh) -> Tensors:
    """Everything that a layout must not change, whole: outputs, the input's gradient, every weight's."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=False)
    ddp = DistributedDataParallel(module.config, config, module, pg_collection=place.groups)
    hidden = cut(draw(5), place).requires_grad_()
    output = ddp(hidden)
    output.backward(cut(draw(6), place))
    finalize_model_grads([ddp], pg_collection=place.groups)
    results = {"output": whole(output.detach(), place), "input's gradient": whole(hidden.grad, place), **weight_gradients(module, place)}
    with torch.no_grad():
        results["packed output"] = whole(module(cut(draw(7)[:, :1], place), packed_seq_params=packed(DOCUMENTS)), place)
    if not place.plan.sp:
        results["decoded output"] = decoded(module, draw(5))
    return results


def weight_gradients(module: torch.nn.Module, place: parallel.Mesh) -> Tensors:
    """Global key -> gradient, put together from slices as the optimizer stores them; each element is there, and equal wherever it is twice."""
    mine = [(box.key, box.global_shape, box.global_offset, part) for box, part in gradient_slices(module, place)]
    everyone: list[Any] = [None] * place.plan.tp
    dist.all_gather_object(everyone, mine, group=place.groups.tp)
    results: Tensors = {}
    for key, shape, offset, part in (slice_ for slices in everyone for slice_ in slices):
        target = results.setdefault(key, torch.full(shape, torch.nan))
        target = target[tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))]
        known = ~target.isnan()
        torch.testing.assert_close(target[known], part[known], rtol=0, atol=0, msg=f"{key} differs between ranks that hold the same rows")
        target.copy_(part)
    assert not any(tensor.isnan().any() for tensor in results.values())
    return results


def gradient_slices(module: torch.nn.Module, place: parallel.Mesh) -> Iterator[tuple[Any, torch.Tensor]]:
    for item in checkpoint(module, place).values():
        flat = item.data.main_grad.view(-1)
        edges = [0, flat.numel() // 3, flat.numel() // 2, flat.numel()]  # as three data-parallel ranks might own it
        for start, stop in itertools.pairwise(edges):
            for box, begin, end in sharded_slices(item, start, stop):
                yield box, flat[begin:end].view(box.local_shape).clone()


def write_expected(folder: Path) -> None:
    """One rank's checkpoint of each case and what it finds."""
    place = mesh(1)
    for name, groups in CASES.items():
        module = layer(sizes(*groups), place)
        randomise(module)
        save(module, place, folder / name)
        torch.save(found(module, place), folder / f"{name}.pt")


def differences(results: Tensors, expected: Tensors) -> dict[str, float]:
    assert results.keys() | {"decoded output"} == expected.keys()
    return {key: ((result - expected[key]).abs().max() / expected[key].abs().max()).item() for key, result in results.items()}


class Nothing:
    """Stands for a communication that was forgotten."""

    @staticmethod
    def apply(x: torch.Tensor, group: Any) -> torch.Tensor:
        return x


def copy_of(module: torch.nn.Module, block: MambaConfig, place: parallel.Mesh) -> torch.nn.Module:
    copy = layer(block, place)
    copy.load_state_dict(module.state_dict())
    return copy


def check_faults(name: str, original: torch.nn.Module, block: MambaConfig, place: parallel.Mesh, expected: Tensors) -> None:
    """What goes around between ranks, left out: the difference that a test sees. Under sequence parallelism, where all of it is needed."""
    replicated = mamba.replicates_groups(block, place.plan.tp)
    faults = {"SumGradient": replicated, "SumOverRanks": block.norm_groups < place.plan.tp, "sequence_parallel": replicated}
    for fault in (fault for fault, possible in faults.items() if possible):
        module = copy_of(original, block, place)
        if fault == "sequence_parallel":
            module.mixer.bc_proj.weight.sequence_parallel = False
        with mock.patch.object(mamba, fault, Nothing, create=True):
            wrong = differences(found_unchecked(module, place), expected)
        assert max(wrong.values()) > FAULT, f"{name}: nothing saw that {fault} was left out: {wrong}"


def found_unchecked(module: torch.nn.Module, place: parallel.Mesh) -> Tensors:
    """`found`, where copies may differ between ranks."""
    with mock.patch.object(torch.testing, "assert_close"), mock.patch.object(torch, "equal", return_value=True):
        return found(module, place)


def check_start_values(place: parallel.Mesh) -> None:
    """Cut parameters differ from rank to rank, common ones are equal, and both are the same every time."""
    modules = []
    for _ in range(2):
        torch.manual_seed(3)
        model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        modules.append(layer(sizes(1, 1), place))
    assert all(torch.equal(a, b) for a, b in zip(*(module.parameters() for module in modules), strict=True))
    for name, common in (("bc_proj.weight", True), ("bc_conv1d.weight", True), ("A_log", False), ("dt_bias", False), ("conv1d.weight", False)):
        parameter = modules[0].mixer.get_parameter(name).detach()
        parts = [torch.empty_like(parameter) for _ in range(place.plan.tp)]
        dist.all_gather(parts, parameter, group=place.groups.tp)
        assert torch.equal(parts[0], parts[1]) == common, name


def main(folder: Path) -> None:
    for tp in (2, 4):
        place = mesh(tp)
        for name, groups in CASES.items():
            block, expected = sizes(*groups), torch.load(folder / f"{name}.pt")
            loaded = load(layer(block, place), place, folder / name)
            save(loaded, place, folder / f"{name}_tp{tp}")
            parallel_in_sequence = replace(place, plan=replace(place.plan, sp=True))
            for layout in (place, parallel_in_sequence):
                wrong = differences(found(copy_of(loaded, block, layout), layout), expected)
                assert max(wrong.values()) < BOUND, f"{name} {layout.plan}: {wrong}"
            check_faults(name, loaded, block, parallel_in_sequence, expected)
    check_start_values(place)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
