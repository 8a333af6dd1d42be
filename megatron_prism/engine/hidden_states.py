"""Hidden states of the trainer's own modules: embeddings, then after every layer, each the mean over an input's tokens, under any tp, pp, sp and dp.

Point 0 is what the first layer is given (Granite's embedding multiplier in it), point i is after the i-th layer of the Hugging Face model, which may
be two of megatron-core's; the last point is after the final norm, as transformers' `output_hidden_states` has it.

Owns: the model without optimizer and loss, its weights read from a checkpoint of any layout or a Hugging Face folder, the hooks (which look, change
nothing, and are gone afterwards), the way from stage to stage, gathering on rank 0. That a plan has neither cp nor vpp is the recipe's to see to.
Called on every rank. Legend: p points, n inputs, b rows of a batch, s tokens, h width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism import families
from megatron_prism.engine import device, merging, parallel, run_folder
from megatron_prism.engine.model import BuildOptions, Chunk, Layers, Precision, build, to_precision
from megatron_prism.engine.padded_batches import PaddedBatch, padded_batches, sum_of_real
from megatron_prism.engine.weight_sync import Part, held_parts, inside
from megatron_prism.families.family import Layered
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan

ALIGNMENT = 8
"""Padded lengths are multiples of this: kernels for matrices and convolutions want it"""
SEED = 1234
"""of random weights, where there are no others"""
Take = Callable[[int, Tensor], None]
"""(point, hidden states [s, b, h])"""


class EngineStates:
    """A model, ready to be looked into."""

    def __init__(self, model: ModelConfig, plan: ParallelPlan, precision: Precision, place: torch.device) -> None:
        """Random weights; `load` puts a model's. The process group must have been joined."""
        assert plan.cp == plan.num_chunks == 1, plan
        self.model, self.place = model, place
        self.mesh = parallel.build_mesh(plan, SEED)
        layers: Layers = "auto" if precision == "bf16" else "local"  # fp32 is for comparing: TransformerEngine's products are not all fp32
        (self.chunk,) = build(model, self.mesh, BuildOptions(precision=precision, layers=layers), place)
        to_precision(self.chunk, self.chunk.config)
        self.chunk.eval()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read this rank's parts of a checkpoint of any layout, or of a Hugging Face folder. Errors: UserError naming a tensor that is missing."""
        source = merging.open_parent(folder)
        wanted: dict[tuple[str, int | None], list[tuple[Part, Tensor]]] = {}
        for part, memory in held_parts([self.chunk], self.mesh).items():
            wanted.setdefault((part.key, part.layer), []).append((part, memory))
        for entry in source.family.rules(self.model):
            stacked = entry.layer is not None and not self.model.is_hybrid
            targets = wanted.pop((entry.key(self.model), entry.layer if stacked else None), [])
            if targets:
                _fill(targets, _whole(source, entry))
        assert not wanted, f"no rule of {self.model.family} reads {sorted(wanted)[:5]}"

    def pooled(self, inputs: Sequence[Sequence[int]], batch_tokens: int, advance: Callable[[int], None]) -> Tensor | None:
        """Token ids of each input -> its mean hidden states, fp32 [p, n, h] on the CPU; None on all ranks but 0. advance: told of inputs done."""
        points, plan = num_points(self.model), self.mesh.plan
        total = torch.zeros(points, len(inputs), self.model.hidden_size, device=self.place)
        batches = padded_batches(inputs, batch_tokens, ALIGNMENT * (plan.tp if plan.sp else 1))
        for number, batch in enumerate(batches):
            if number % plan.dp == self.mesh.dp_rank:
                self._add(total, batch)
            advance(len(batch.places))
        dist.reduce(total, dst=0)  # each number stands on one rank, or in parts on those of sequence parallelism; the others have zeros
        lengths = torch.tensor([len(tokens) for tokens in inputs], device=self.place)
        return (total / lengths[None, :, None]).cpu() if self.mesh.rank == 0 else None

    def close(self) -> None:
        """Give the model's memory back."""
        del self.chunk
        if self.place.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _add(self, total_pnh: Tensor, batch: PaddedBatch) -> None:
        """One batch through this rank's stage."""
        plan, lengths = self.mesh.plan, batch.lengths.to(self.place)
        places = torch.tensor(batch.places, device=self.place)
        local = batch.ids.shape[1] // (plan.tp if plan.sp else 1)
        first = self.mesh.tp_rank * local if plan.sp else 0

        def take(point: int, hidden_sbh: Tensor) -> None:
            if plan.sp or self.mesh.tp_rank == 0:  # else all tensor-parallel ranks know the same
                total_pnh[point, places] = sum_of_real(hidden_sbh.transpose(0, 1), lengths, first)

        if not self.mesh.is_first_stage:
            self.chunk.set_input_tensor(self._received(local, len(batch.places)))
        with listening(self.chunk, self.model, take):
            hidden_sbh = final_states(self.chunk, batch.ids.to(self.place))
        if self.mesh.is_last_stage:
            take(num_points(self.model) - 1, hidden_sbh)
        else:
            dist.send(hidden_sbh.contiguous(), self._neighbour(1), group=self.mesh.groups.pp)

    def _received(self, tokens: int, rows: int) -> Tensor:
        hidden_sbh = torch.empty(tokens, rows, self.model.hidden_size, dtype=self.chunk.config.params_dtype, device=self.place)
        dist.recv(hidden_sbh, self._neighbour(-1), group=self.mesh.groups.pp)
        return hidden_sbh

    def _neighbour(self, step: int) -> int:
        """The rank of a stage before or after this one."""
        return dist.get_global_rank(self.mesh.groups.pp, self.mesh.pp_rank + step)


def num_points(model: ModelConfig) -> int:
    """Embeddings, and one for each layer of the Hugging Face model."""
    return 1 + model.num_layers // model.layers_per_block


@contextmanager
def listening(chunk: Chunk, model: ModelConfig, take: Take) -> Iterator[None]:
    """Inside, `take` is given the states at every point of this chunk but the last, while it computes as ever."""

    def before_first(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(0, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def after(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        point, rest = divmod(layer.layer_number, model.layers_per_block)
        if not rest and point < num_points(model) - 1:
            take(point, output[0] if isinstance(output, tuple) else output)

    layers = list(chunk.decoder.layers)
    hooks = [layer.register_forward_hook(after) for layer in layers]
    if chunk.pre_process:
        hooks.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def final_states(chunk: Chunk, ids_bs: Tensor) -> Tensor:
    """What a chunk ends with, [s, b, h], under sp a part of s: of the last one the states after the final norm, and no logits."""
    positions_bs = torch.arange(ids_bs.shape[1], device=ids_bs.device).expand_as(ids_bs)
    before, chunk.post_process = chunk.post_process, False  # megatron-core then ends with the last hidden states
    try:
        hidden_sbh: Tensor = chunk(ids_bs, positions_bs, None)
    finally:
        chunk.post_process = before
    return hidden_sbh


def _whole(source: merging.Parent, entry: Layered) -> Tensor:
    """megatron-core's tensor of a rule, the vocabulary unpadded."""
    sections = entry.rule.sections(source.tensors(entry), source.model)
    return sections[0] if len(sections) == 1 else torch.cat(sections)


def _fill(targets: Sequence[tuple[Part, Tensor]], whole: Tensor) -> None:
    for part, memory in targets:
        size = inside(part, tuple(whole.shape))
        box = tuple(slice(offset, offset + length) for offset, length in zip(part.offset, size, strict=True))
        memory.zero_()  # what is beyond it is padding
        memory[tuple(slice(0, length) for length in size)].copy_(whole[box])


@contextmanager
def open_engine(folder: Path, plan: ParallelPlan, precision: Precision, device_name: device.DeviceName) -> Iterator[EngineStates]:
    """A checkpoint or a Hugging Face folder on this launch's ranks; its memory is free again afterwards."""
    _, model = families.load(run_folder.hf_files(folder))
    place = device.setup(device_name)
    parallel.start(place)
    states = EngineStates(model, plan, precision, place)
    states.load(folder)
    try:
        yield states
    finally:
        states.close()
