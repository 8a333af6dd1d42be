"""The weights of a run in progress, in Hugging Face names: gathered from the trainer's sharded modules in buckets, without touching disk.

    for name, tensor in weight_stream(engine, model_config): ...        on every rank

What a checkpoint would store says which rank holds which part of which global tensor, and the family's rules turn those into Hugging Face's: no
layout and no family needs anything of its own here. Owns: who sends what to whom, and the order. Memory beyond the model: one bucket and one tensor.

These are the weights that the trainer computes with: in a bf16 run bf16 (what the fp32 masters round to), with those that stay fp32 in it in fp32.
So a stream and an export agree bit for bit in that type, and the export in fp32 of a bf16 run, made of the masters, has digits that no stream has.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_prism.engine.checkpoint import gather_weights
from megatron_prism.engine.model import unwrap
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.step import Engine
from megatron_prism.families import FAMILIES
from megatron_prism.families.family import Layered
from megatron_prism.families.model_config import ModelConfig

BUCKET_BYTES = 2**29
ALIGNMENT = 16
"""Parts begin at multiples of this in a message, so that it can be looked at as any type"""
Ranks = Literal["first", "all"]


def weight_stream(
    engine: Engine, model: ModelConfig, dtype: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES, ranks: Ranks = "first"
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) for every weight, as `prism convert export` would write them now; in the order of the family's rules.

    Every rank must go through it to the end: it yields on rank 0 alone (the others find it empty), or with ranks="all" on each. A tensor is good
    until the next is asked for, and may be the trainer's own memory: copy what is kept, write into none. dtype: None is the trainer's own; else
    all but the weights that no conversion rounds (`Rule.keep_fp32`). bucket_bytes: what is received at a time; a larger tensor comes alone.
    """
    if engine.model[0].ddp_config.overlap_param_gather:  # else the optimizer's step has done it
        gather_weights(engine)
    held = _held(engine)
    plan = _plan(model, held, dtype, receivers=dist.get_world_size() if ranks == "all" else 1)
    receives = ranks == "all" or dist.get_rank() == 0
    buckets = iter(_buckets(plan, bucket_bytes))
    for bucket in buckets:
        parts = _exchange(bucket, held, engine.device, ranks)
        try:
            for piece in bucket if receives else ():
                tensors = piece.entry.rule.split(_whole(piece, parts, engine.device), model)
                yield from zip((part.name for part in piece.entry.parts(model)), tensors, strict=True)
        except GeneratorExit:  # whoever reads has had enough; the other ranks must not wait for ever
            for rest in buckets:
                _exchange(rest, held, engine.device, ranks)
            raise
        del parts


# --- what there is, and who has it -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A box of a global tensor that some ranks hold. layer: the place on the leading layer axis, which offset and size do not show."""

    key: str
    layer: int | None
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """One rule's tensor of one layer, and the parts that make it up. owners: the first rank that holds each part.

    missing: whether some receiver holds no copy of the part, so that it must be sent.
    """

    entry: Layered
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    owners: tuple[int, ...]
    missing: tuple[bool, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def _held(engine: Engine) -> dict[Part, Tensor]:
    """What this rank of a run holds."""
    return held_parts(engine.model, engine.mesh)


def held_parts(chunks: Iterable[Any], mesh: Mesh) -> dict[Part, Tensor]:
    """What this rank holds of the global tensors, in the model's own memory. chunks: of the model, wrapped or not."""
    found: dict[Part, Tensor] = {}
    for chunk in chunks:
        for item in nested_values(unwrap(chunk).sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})):
            tensors = nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]
            found |= {_part(tensor): tensor.data.detach() for tensor in tensors if isinstance(tensor, ShardedTensor)}
    return found


def _part(tensor: ShardedTensor) -> Part:
    leading = tensor.prepend_axis_num
    assert leading <= 1 and tensor.data is not None, tensor.key
    layer = tensor.global_offset[0] if leading else None
    return Part(tensor.key, layer, tuple(tensor.global_offset[leading:]), tuple(tensor.local_shape), tensor.data.dtype)


def _plan(model: ModelConfig, held: dict[Part, Tensor], dtype: torch.dtype | None, receivers: int) -> list[Piece]:
    """Every tensor in the order of the rules, alike on every rank. One small exchange: who holds what.

    A part that nobody is to read, or a tensor whose parts do not fill it, is a fault of ours: nothing is left out in silence.
    """
    everybody: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, list(held))
    holders: dict[Part, list[int]] = {}
    for rank, parts in enumerate(everybody):
        for part in parts:
            holders.setdefault(part, []).append(rank)
    by_tensor: dict[tuple[str, int | None], list[Part]] = {}
    for part in holders:
        by_tensor.setdefault((part.key, part.layer), []).append(part)
    plan = []
    for entry in FAMILIES[model.family].rules(model):
        stacked = entry.layer is not None and not model.is_hybrid
        parts = sorted(by_tensor.pop((entry.key(model), entry.layer if stacked else None)), key=lambda part: part.offset)
        missing = tuple(sum(rank < receivers for rank in holders[part]) < receivers for part in parts)
        plan.append(_piece(entry, model, parts, dtype, tuple(holders[part][0] for part in parts), missing))
    assert not by_tensor, f"no rule of {model.family} reads {sorted(by_tensor)[:5]}"
    return plan


def _piece(
    entry: Layered, model: ModelConfig, parts: Sequence[Part], dtype: torch.dtype | None, owners: tuple[int, ...], missing: tuple[bool, ...]
) -> Piece:
    shape, own = entry.rule.shape(model), parts[0].dtype
    filled = sum(prod(inside(part, shape)) for part in parts)
    assert filled == prod(shape) and len({part.dtype for part in parts}) == 1, f"{entry.key(model)}: the ranks hold {filled} of {prod(shape)} numbers"
    kept = entry.rule.keep_fp32 and dtype != torch.float32
    return Piece(entry, shape, own if dtype is None or kept else dtype, tuple(parts), owners, missing)


def inside(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The size of what lies within the tensor: the vocabulary is padded beyond it."""
    return tuple(max(0, min(size, whole - offset)) for offset, size, whole in zip(part.offset, part.size, shape, strict=True))


def _buckets(plan: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Pieces in order, as many at a time as stay within the limit, at least one."""
    bucket: list[Piece] = []
    size = 0
    for piece in plan:
        if bucket and size + piece.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += piece.nbytes
    if bucket:
        yield bucket


# --- from rank to rank -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A part on its way: where its bytes stand in its owner's message."""

    part: Part
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + prod(self.part.size) * self.dtype.itemsize


def _messages(bucket: Sequence[Piece]) -> dict[int, list[Sent]]:
    """What each owner sends of a bucket, one message each."""
    messages: dict[int, list[Sent]] = {}
    for piece in bucket:
        for part, owner, missing in zip(piece.parts, piece.owners, piece.missing, strict=True):
            if missing:
                message = messages.setdefault(owner, [])
                end = message[-1].stop if message else 0
                message.append(Sent(part, piece.dtype, -(-end // ALIGNMENT) * ALIGNMENT))
    return messages


def _exchange(bucket: Sequence[Piece], held: dict[Part, Tensor], device: torch.device, ranks: Ranks) -> dict[Part, Tensor]:
    """All parts of a bucket on the ranks that receive: their own from their memory, the others' from messages. Rounded before it is sent."""
    me, messages = dist.get_rank(), _messages(bucket)
    buffers = {
        owner: _packed(message, held, device) if owner == me else torch.empty(message[-1].stop, dtype=torch.uint8, device=device)
        for owner, message in messages.items()
        if ranks == "all" or me in (0, owner)
    }
    if ranks == "all":
        for owner, buffer in buffers.items():
            dist.broadcast(buffer, src=owner)
    elif buffers:
        works = [dist.P2POp(dist.isend, buffer, 0) if owner == me else dist.P2POp(dist.irecv, buffer, owner) for owner, buffer in buffers.items()]
        for work in dist.batch_isend_irecv(works):
            work.wait()
    found = {part: held[part] for piece in bucket for part in piece.parts if part in held}
    for owner, message in messages.items():
        found |= {sent.part: _view(buffers[owner], sent) for sent in message if sent.part not in held and owner in buffers}
    return found


def _packed(message: Sequence[Sent], held: dict[Part, Tensor], device: torch.device) -> Tensor:
    buffer = torch.empty(message[-1].stop, dtype=torch.uint8, device=device)
    for sent in message:
        _view(buffer, sent).copy_(held[sent.part])
    return buffer


def _view(buffer: Tensor, sent: Sent) -> Tensor:
    return buffer[sent.start : sent.stop].view(sent.dtype).view(sent.part.size)


def _whole(piece: Piece, parts: dict[Part, Tensor], device: torch.device) -> Tensor:
    """A piece's tensor; that of one part is not copied unless its type changes."""
    if len(piece.parts) == 1:
        (part,) = piece.parts
        return parts[part][tuple(slice(0, length) for length in piece.shape)].to(piece.dtype)
    whole = torch.empty(piece.shape, dtype=piece.dtype, device=device)
    for part in piece.parts:
        size = inside(part, piece.shape)
        place = tuple(slice(offset, offset + length) for offset, length in zip(part.offset, size, strict=True))
        whole[place] = parts[part][tuple(slice(0, length) for length in size)]
    return whole
