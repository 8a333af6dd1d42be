"""The Mamba-2 mixer, plugged into megatron-core's MambaLayer by `mixer_spec`: cut by heads over tensor-parallel ranks, as many as one likes.

Owns: projections, convolution, scan and gated norm of one rank, their start values, the state of cached decoding (`mamba_share` knows which rows).
B and C belong to groups of heads. Where tp divides the groups each rank makes its own; where ranks outnumber them (one group in most models) every
rank makes them all from a replicated projection and convolution, and their gradients, of which a rank's heads give a share only, are summed.
Projections and gated norm look at each token alone. Convolution and scan need the sequence whole and in order: context-parallel ranks exchange their
parts of it for a part of the heads, and back (`MambaMixer._scan_by_heads`).
Refuses (by assertion; plans are checked before): sizes that tp and cp do not cut evenly, and cached decoding under context parallelism.
Legend: s sequence, b batch, l the same sequence after the batch, d channels, h heads, p channels of a head, g groups of heads, n state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_prism.engine.context_parallel import to_channels, to_tokens
from megatron_prism.engine.documents import Documents, ids, segment_ends
from megatron_prism.engine.mamba_share import Rows, ScannedPart, Share, replicates_groups, sharded_rows, shifted
from megatron_prism.families.model_config import MambaConfig
from megatron_prism.kernels.causal_conv1d import causal_conv1d
from megatron_prism.kernels.gated_norm import gated_norm
from megatron_prism.kernels.ssd_scan import ssd_scan

A_RANGE = (1.0, 16.0)
"""-A at the start, uniform (Dao & Gu 2024)"""
STEP_RANGE = (1e-3, 1e-1)
"""softplus(dt_bias) at the start, log-uniform"""


def mixer_spec(transformer_engine: bool, mamba: MambaConfig, tp: int, *, norm: type, bias_dropout_add: Callable[..., Any]) -> ModuleSpec:
    """megatron-core's MambaLayer with our mixer.

    norm: class of the norm before the mixer, called with config, hidden_size and eps; used unless TransformerEngine fuses it into the projection,
    which it cannot where the replicated B and C need the normed input too. bias_dropout_add: a function such as megatron-core's own.
    """
    column, row, fused = ColumnParallelLinear, RowParallelLinear, False
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear

        fused = not replicates_groups(mamba, tp)
        column, row = TELayerNormColumnParallelLinear if fused else TEColumnParallelLinear, TERowParallelLinear
    mixer = ModuleSpec(module=MambaMixer, params={"mamba": mamba}, submodules=MixerSubmodules(in_proj=column, out_proj=row))
    submodules = MambaLayerSubmodules(
        norm=IdentityOp if fused else ModuleSpec(module=InputNorm, params={"norm": norm}),
        mixer=mixer,
        mamba_bda=bias_dropout_add,
        sharded_state_dict_keys_map={} if fused else {"norm.": "mixer.in_proj.layer_norm_"},
    )
    return ModuleSpec(module=MambaLayer, submodules=submodules)


class InputNorm:
    """The norm before the mixer with the model's epsilon, which MambaLayer of megatron-core 0.16 does not hand on (0.19 does)."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, norm: type, eps: float | None = None) -> Any:
        return norm(config=config, hidden_size=hidden_size, eps=config.layernorm_epsilon)


@dataclass
class MixerSubmodules:
    """The linear layers of the mixer: column-parallel in, row-parallel out."""

    in_proj: type
    out_proj: type


class MambaMixer(MegatronModule):
    """[s, b, hidden] -> [s, b, hidden]: in_proj, short convolution and silu, scan, gated norm, out_proj (all without bias but the convolution).

    Under sequence parallelism input and output are the rank's part of the sequence, as the linear layers given by the spec have it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        mamba: MambaConfig,
        d_model: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,  # given by megatron-core 0.19, for its logs
    ) -> None:
        super().__init__(config)
        self.mamba, self.layer_number, self.tp_group, self.cp_group = mamba, layer_number, pg_collection.tp, pg_collection.cp
        self.share = share = Share(mamba, self.tp_group.size(), self.tp_group.rank())
        self.scanned_parts = [ScannedPart(share, config.context_parallel_size, rank) for rank in range(config.context_parallel_size)]
        rows = mamba.in_proj_size - (mamba.bc_size if share.replicated else 0)
        shared: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        column = {"init_method": config.init_method, "gather_output": False, "skip_bias_add": False, "tp_comm_buffer_name": "fc1"}
        row = {"init_method": config.output_layer_init_method, "input_is_parallel": True, "skip_bias_add": True, "tp_comm_buffer_name": "fc2"}
        self.in_proj = build_module(submodules.in_proj, d_model, rows, **column, **shared)
        self.out_proj = build_module(submodules.out_proj, mamba.d_inner, d_model, **row, **shared)
        with get_cuda_rng_tracker().fork():
            self.conv1d = Convolution(sum(length for _, length in share.conv_rows), mamba, config)
            steps = torch.empty(share.heads, device=init_device(config)).uniform_(*map(math.log, STEP_RANGE)).exp()
            decays = torch.empty(share.heads, device=init_device(config)).uniform_(*A_RANGE)
        if share.replicated:  # drawn from the generator that all tensor-parallel ranks have in common
            self.bc_proj = torch.nn.Linear(d_model, mamba.bc_size, bias=False, dtype=config.params_dtype, device=init_device(config))
            config.init_method(self.bc_proj.weight)
            # a rank's gradient is that of its part of the sequence; megatron-core sums them
            self.bc_proj.weight.sequence_parallel = config.sequence_parallel
            self.bc_conv1d = Convolution(mamba.bc_size, mamba, config, shared_by=self.tp_group)
        self.dt_bias = head_parameter(steps + torch.log(-torch.expm1(-steps)), config)  # softplus(dt_bias) = steps
        self.A_log = head_parameter(decays.log(), config)
        self.D = head_parameter(torch.ones(share.heads), config)
        self.norm = GatedNorm(share, config, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, hidden] -> (output [s, b, hidden], no bias).

        inference_context: a static one; its `key_value_memory_dict[layer_number]` keeps the last inputs of the convolution and the scan's state.
        packed_seq_params: documents lie end to end in a batch of 1, and each starts from nothing.
        """
        decoding = inference_context is not None
        past_conv, past_scan = self._past(inference_context)
        projected_sbd, _ = self.in_proj(hidden_states)
        z_sbd, x_or_xbc, dt = projected_sbd.split([self.share.inner, sum(length for _, length in self.share.conv_rows), self.share.heads], dim=-1)
        if len(self.scanned_parts) > 1:
            assert not decoding
            y_sbd = self._scan_by_heads(x_or_xbc, dt, hidden_states, packed_seq_params)
            return self.out_proj(self.norm(y_sbd, z_sbd))[0], None
        documents = None if packed_seq_params is None else document_ids(packed_seq_params, projected_sbd.shape[0])
        x_blhp, b_blgn, c_blgn, conv_state = self._convolve(x_or_xbc.transpose(0, 1), hidden_states, documents, past_conv, decoding)
        heads = slice(0, self.share.heads)
        y_blhp, scan_state = self._scan(x_blhp, dt.transpose(0, 1), b_blgn, c_blgn, heads, documents, past_scan, decoding)
        if inference_context is not None:
            inference_context.key_value_memory_dict[self.layer_number] = (conv_state, scan_state)
        out, _ = self.out_proj(self.norm(y_blhp.flatten(2).transpose(0, 1), z_sbd))
        return out, None

    def _scan(
        self,
        x_blhp: Tensor,
        dt_blh: Tensor,
        b_blgn: Tensor,
        c_blgn: Tensor,
        heads: slice,
        documents: Tensor | None,
        past_bhpn: Tensor | None = None,
        decoding: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """With the parameters of some of this rank's heads -> y [b, l, h, p], and, decoding, the last state."""
        scanned = ssd_scan(
            x_blhp,
            dt_blh,
            -self.A_log[heads].float().exp(),
            b_blgn,
            c_blgn,
            chunk_size=self.mamba.chunk_size,
            d_h=self.D[heads],
            dt_bias_h=self.dt_bias[heads],
            time_step_limit=self.mamba.time_step_limit,
            initial_state_bhpn=past_bhpn,
            document_bl=documents,
            return_state=decoding,
        )
        return scanned if isinstance(scanned, tuple) else (scanned, None)

    def _scan_by_heads(self, x_or_xbc_sbd: Tensor, dt_sbh: Tensor, hidden_states: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """Under context parallelism: convolution and scan of the whole sequence for a part of the heads -> y of this rank's tokens."""
        part, xbc_sbd = self.scanned_parts[self.cp_group.rank()], x_or_xbc_sbd
        if self.share.replicated:
            xbc_sbd = torch.cat([xbc_sbd, cast(Tensor, SumGradient.apply(self._project_bc(hidden_states), self.tp_group))], dim=-1)
        sent = [torch.cat([*(xbc_sbd[..., channels] for channels in to.channels), dt_sbh[..., to.heads]], dim=-1) for to in self.scanned_parts]
        whole_bld = to_channels(sent, packed, self.cp_group).transpose(0, 1)
        documents = None if packed is None else document_ids(packed, whole_bld.shape[1])
        x, bc = part.heads_held * self.mamba.head_dim, part.groups * self.mamba.state_dim
        xbc_bld, dt_blh = whole_bld.split([x + 2 * bc, part.heads_held], dim=-1)
        x_bld, b_bld, c_bld = self._convolve_part(xbc_bld, part, documents).split([x, bc, bc], dim=-1)
        b_blgn, c_blgn = (channels.unflatten(-1, (part.groups, self.mamba.state_dim)) for channels in (b_bld, c_bld))
        y_blhp, _ = self._scan(x_bld.unflatten(-1, (part.heads_held, self.mamba.head_dim)), dt_blh, b_blgn, c_blgn, part.heads, documents)
        return to_tokens(y_blhp.flatten(2).transpose(0, 1), packed, self.cp_group)

    def _convolve_part(self, xbc_bld: Tensor, part: ScannedPart, documents: Tensor | None) -> Tensor:
        """x, B and C of a part of the heads -> the same, convolved."""
        own, shared = part.convolved
        if not shared:
            return cast(Tensor, self.conv1d(xbc_bld, documents, channels=own)[0])
        x_bld, bc_bld = xbc_bld.tensor_split([own[0].stop - own[0].start], dim=-1)
        return torch.cat([self.conv1d(x_bld, documents, channels=own)[0], self.bc_conv1d(bc_bld, documents, channels=shared)[0]], dim=-1)

    def _past(self, context: BaseInferenceContext | None) -> tuple[Tensor | None, Tensor | None]:
        """States left by the tokens before; none at the start of a prompt."""
        if context is None:
            return None, None
        assert context.is_static_batching(), "decoding with a dynamic batch is not supported"
        if context.sequence_len_offset == 0:
            return None, None
        states: tuple[Tensor, Tensor] = context.key_value_memory_dict[self.layer_number]
        return states

    def _convolve(
        self, x_or_xbc_bld: Tensor, hidden_states: Tensor, documents: Tensor | None, past_bdk: Tensor | None, decoding: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> x, B and C of this rank's heads, and, decoding, the last inputs [b, d, k - 1] of all of them."""
        share = self.share
        if share.replicated:
            past_x, past_bc = (None, None) if past_bdk is None else past_bdk.split([share.inner, share.bc], dim=1)
            x_bld, state_x = self.conv1d(x_or_xbc_bld, documents, past_x, decoding)
            bc_sbd = SumGradient.apply(self._project_bc(hidden_states), self.tp_group)
            bc_bld, state_bc = self.bc_conv1d(bc_sbd.transpose(0, 1), documents, past_bc, decoding)
            state = torch.cat([state_x, state_bc], dim=1) if decoding else None
        else:
            xbc_bld, state = self.conv1d(x_or_xbc_bld, documents, past_bdk, decoding)
            x_bld, bc_bld = xbc_bld.split([share.inner, share.bc], dim=-1)
        b_blgn, c_blgn = bc_bld.unflatten(-1, (2, share.groups, self.mamba.state_dim))[:, :, :, share.own_groups].unbind(2)
        return x_bld.unflatten(-1, (share.heads, self.mamba.head_dim)), b_blgn, c_blgn, state

    def _project_bc(self, hidden_states: Tensor) -> Tensor:
        """Replicated B and C of the whole sequence. Every rank then has their whole gradient, so that a rank's part of it needs no sum."""
        bc_sbd = self.bc_proj(hidden_states)
        if not self.config.sequence_parallel:
            return cast(Tensor, bc_sbd)
        return cast(Tensor, gather_from_sequence_parallel_region(bc_sbd, tensor_parallel_output_grad=False, group=self.tp_group))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Each tensor under Hugging Face's rows, of which this rank has some: `in_proj.weight` and `conv1d.*` in several pieces."""
        assert not sharded_offsets, "hybrid layers have keys of their own, no leading layer axis"
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = {}
        for name, linear in (("in_proj", self.in_proj), ("out_proj", self.out_proj)):
            state |= sharded_state_dict_default(linear, f"{prefix}{name}.", (), metadata, tp_group=self.tp_group)
        dp_rank, replicas = metadata["dp_cp_group"].rank(), self.share.rank
        parameters = dict(self.named_parameters())
        for name, key, rows, total in self._places():
            copy = replicas if name.startswith("bc_") else 0
            state[prefix + name] = sharded_rows(parameters[name], prefix + key, rows, total, (0, copy, dp_rank))
        return state

    def _places(self) -> list[tuple[str, str, Rows, int]]:
        """(parameter, key of the global tensor, rows of it, its number of rows) for all but out_proj."""
        share, mamba = self.share, self.mamba
        places = [("in_proj.weight", "in_proj.weight", share.in_proj_rows, mamba.in_proj_size)]
        places += [(name, name, share.head_rows, mamba.num_heads) for name in ("A_log", "D", "dt_bias")]
        places.append(("norm.weight", "norm.weight", share.inner_rows, mamba.d_inner))
        leaves = ("weight", "bias") if mamba.conv_bias else ("weight",)
        places += [(f"conv1d.{leaf}", f"conv1d.{leaf}", share.conv_rows, mamba.conv_size) for leaf in leaves]
        if share.replicated:
            rows = share.bc_rows
            places.append(("bc_proj.weight", "in_proj.weight", shifted(rows, 2 * mamba.d_inner), mamba.in_proj_size))
            places += [(f"bc_conv1d.{leaf}", f"conv1d.{leaf}", shifted(rows, mamba.d_inner), mamba.conv_size) for leaf in leaves]
        return places


class Convolution(torch.nn.Module):
    """Weight [d, 1, k] and bias [d] of the short convolution; uniform at the start, as torch's Conv1d.

    shared_by: the ranks that hold copies of one convolution, of whose output each uses a part. Their gradients are summed, so that all copies get
    the same bits: a kernel that sums in no fixed order would let copies drift apart if each rank made the whole gradient.
    """

    def __init__(self, channels: int, mamba: MambaConfig, config: TransformerConfig, shared_by: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        bound, dtype, device = mamba.conv_kernel**-0.5, config.params_dtype, init_device(config)
        weight = torch.empty(channels, 1, mamba.conv_kernel, device=device).uniform_(-bound, bound)
        self.shared_by, parallel = shared_by, shared_by is None
        self.weight = parameter(weight, dtype, config, parallel)
        self.bias = parameter(torch.empty(channels, device=device).uniform_(-bound, bound), dtype, config, parallel) if mamba.conv_bias else None

    def forward(
        self,
        x_bld: Tensor,
        documents: Tensor | None,
        past_bdk: Tensor | None = None,
        decoding: bool = False,
        channels: Sequence[slice] = (slice(None),),
    ) -> tuple[Tensor, Tensor | None]:
        """-> silu of the convolution [b, l, d], and, decoding, the last inputs [b, d, k - 1]. channels: those that x has; all by default."""
        weight, bias = self._summed(self.weight), None if self.bias is None else self._summed(self.bias)
        weight_dk, bias_d = _rows(weight.squeeze(1), channels), None if bias is None else _rows(bias, channels)
        out = causal_conv1d(x_bld, weight_dk, bias_d, activation="silu", document_bl=documents, initial_state_bdk=past_bdk, return_state=decoding)
        return out if isinstance(out, tuple) else (out, None)

    def _summed(self, value: Tensor) -> Tensor:
        return value if self.shared_by is None else cast(Tensor, SumGradient.apply(value, self.shared_by))


def _rows(x: Tensor, parts: Sequence[slice]) -> Tensor:
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


class GatedNorm(torch.nn.Module):
    """norm(y * silu(z)) * weight, each of the norm groups normalised alone.

    Where tp cuts a norm group apart, its sum of squares goes around.
    """

    def __init__(self, share: Share, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self.eps, self.tp_group = share, config.layernorm_epsilon, tp_group
        self.weight = parameter(torch.ones(share.inner), config.params_dtype, config, parallel=True)

    def forward(self, y_sbd: Tensor, z_sbd: Tensor) -> Tensor:
        """y, z [s, b, d] -> [s, b, d] in y's type."""
        group_size = self.share.mamba.d_inner // self.share.mamba.norm_groups
        if group_size <= self.share.inner:
            return gated_norm(y_sbd, z_sbd, self.weight, group_size=group_size, eps=self.eps)
        if not torch.is_grad_enabled():
            return self._over_ranks(y_sbd, z_sbd)
        return cast(Tensor, checkpoint(self._over_ranks, y_sbd, z_sbd, use_reentrant=False, preserve_rng_state=False))

    def _over_ranks(self, y_sbd: Tensor, z_sbd: Tensor) -> Tensor:
        """This rank's part of one group."""
        total, tp, mamba = self.share.mamba.norm_groups, self.share.tp, self.share.mamba
        gated = y_sbd.float() * F.silu(z_sbd.float())
        own = self.share.rank * total // tp
        squares = F.pad(gated.square().sum(-1, keepdim=True), (own, total - 1 - own))
        squares = SumOverRanks.apply(squares, self.tp_group)[..., own : own + 1]
        normed = gated * torch.rsqrt(squares / (mamba.d_inner // total) + self.eps)
        return (self.weight * normed.to(y_sbd.dtype)).contiguous()


def init_device(config: TransformerConfig) -> Any:
    """Where parameters are made."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def parameter(values: Tensor, dtype: torch.dtype, config: TransformerConfig, parallel: bool) -> torch.nn.Parameter:
    """A parameter, cut over tensor-parallel ranks along dimension 0 or the same on all."""
    made = torch.nn.Parameter(values.to(device=init_device(config), dtype=dtype))
    if parallel:
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=0, stride=1)
    return made


def head_parameter(values_h: Tensor, config: TransformerConfig) -> torch.nn.Parameter:
    """One number for each head, in fp32 whatever the model's type: the scan multiplies them up over the whole sequence."""
    made = parameter(values_h, torch.float32, config, parallel=True)
    made.keep_fp32 = True
    return made


def document_ids(packed: PackedSeqParams, length: int) -> Tensor:
    """[1, l]: for each token the number of its document; worked out once for a micro-batch where it comes with its `Documents`."""
    return packed.ids if isinstance(packed, Documents) else ids(segment_ends(packed), length)


# megatron-core's own versions of these two sum in place and lose the sum of a non-contiguous tensor (mappings.py:29)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class SumGradient(torch.autograd.Function):
    """The same tensor on all ranks, each of which uses it for something else: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors, of which each rank makes other use: the gradient too is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None
