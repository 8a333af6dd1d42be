"""Where a NaN or an infinity begins: the micro-batches of a step once more, with every tensor looked at as it is made.

What is not finite spreads: to later layers and stages, to tensor- and context-parallel ranks, through the gradients to everyone. Each rank notes the
first such tensor of each of its micro-batches, in the forward or the backward pass; of all these the one that comes first in the order of
micro-batch, pass and pipeline stage is where it began, for micro-batches know nothing of each other. A weight counts where a layer uses it.

Owns: the hooks, which look, change nothing and are gone afterwards, and the words. Called on every rank, with the weights as they were at the step.
Waits for the device at every tensor: for steps that went wrong alone. Refuses nothing: what does not happen again is said to be so.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_prism.engine.model import unwrap
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.step import Engine

Table = dict[str, Any]
NAMED = 4
"""of what there are many of, so many are named to people"""
ONCE = {
    False: "That tells no cause: kernels or exchanges whose sums have no fixed order may do so near an overflow (deterministic=true rules that out), "
    "and so may a device or memory that was wrong once",
    True: "Sums had a fixed order (deterministic=true), so that a device or memory that was wrong once is the likely cause; it is not seen which",
}
"""what may be said of a step that went wrong and whose replay did not, by whether sums had a fixed order"""
NOUNS = {"activation": "output of", "input": "input of", "gradient": "gradient of the output of", "weight gradient": "gradient of"}


@dataclass(frozen=True)
class Sight:
    """A tensor that is not finite, the first of its micro-batch on its rank.

    micro_batch: counted over all data-parallel ranks, as samples are dealt out; stage: of the pipeline, chunks of an interleaved one counted through;
    order: place among what this rank's chunk made in this pass. what: activation, input, gradient, or weight gradient; module: numbered over the
    whole model, from 0, as in a checkpoint; before: the tensor looked at before it, which is finite. index: of the first of `count` numbers.
    """

    rank: int
    micro_batch: int
    backward: bool
    stage: int
    order: int
    what: str
    module: str
    before: str | None
    shape: list[int]
    index: list[int]
    count: int
    value: str
    largest: float | None
    weights: list[str] = field(default_factory=list)
    """the module's own weights that are not finite"""

    @property
    def key(self) -> tuple[int, bool, int, int]:
        """Earlier is smaller: stages go up in the forward pass and down in the backward pass."""
        return self.micro_batch, self.backward, -self.stage if self.backward else self.stage, self.order


@dataclass(frozen=True)
class Origin:
    """What a replay found: equal on every rank. sights: the earliest, on each rank that has it at the same place.

    repeated: whether loss or gradient norm were no numbers again. micro_batches: those that went wrong. weights: by rank, those that are not finite.
    gradients: by rank, weights whose gradients of the whole step were not finite before ranks were summed; largest: of the others, with its rank.
    """

    repeated: bool
    sights: list[Sight]
    micro_batches: list[int]
    num_micro_batches: int
    places: list[Table]
    num_layers: int
    weights: dict[int, list[str]]
    gradients: dict[int, list[str]]
    largest: tuple[float, str, int] | None
    fixed_order: bool = False
    """whether sums had a fixed order (deterministic=true)"""

    @property
    def micro_batch(self) -> int | None:
        """The first one that went wrong."""
        return self.sights[0].micro_batch if self.sights else None

    def record(self) -> Table:
        """For a JSON file: no number in it is NaN."""
        first = asdict(self.sights[0]) if self.sights else {}
        return {
            "repeated": self.repeated,
            "first": first | ({"layer": _layer(first["module"])} if first else {}),
            "ranks": [self.places[sight.rank] for sight in self.sights],
            "micro_batches": self.micro_batches,
            "weights": {str(rank): names for rank, names in self.weights.items()},
            "weight_gradients": {str(rank): names for rank, names in self.gradients.items()},
        }

    def describe(self) -> str:
        """For people, in one line."""
        if self.sights:
            return self._first() + ("" if self.repeated else "; yet loss and gradient norm of that replay are finite")
        if self.gradients:
            rank, names = min(self.gradients.items())
            return f"the gradients of {_few(names)} are not finite on {_place(self.places[rank])}; no activation was seen to be"
        if not self.repeated:
            return (
                "it did not happen again when the batch was replayed with the same weights: loss, gradient norm and every tensor were finite. "
                + ONCE[self.fixed_order]
            )
        said = "every tensor of every rank is finite, the gradients' sum over the ranks, or the sum of their squares, is not"
        return said if self.largest is None else f"{said}; the largest, {self.largest[0]:.3g}, is of {self.largest[1]} on rank {self.largest[2]}"

    def _first(self) -> str:
        sight = self.sights[0]
        layer = _layer(sight.module)
        where = sight.module if layer is None else f"{sight.module} (layer {layer} of 0 to {self.num_layers - 1})"
        run = "backward" if sight.backward else "forward"
        ranks = _place(self.places[sight.rank]) + "".join(f" and {_place(self.places[other.rank])}" for other in self.sights[1:])
        parts = [
            f"{sight.value} first in the {run} pass of micro-batch {sight.micro_batch}: {NOUNS[sight.what]} {where}",
            f"on {ranks}",
            f"{sight.count:,} of its {_size(sight.shape):,} numbers, the first at {sight.index}",
        ]
        if sight.weights:
            parts.append(f"whose weight is no number already: {_few(sight.weights)}")
        elif sight.before is not None:
            parts.append(f"the {sight.before}, before it, is finite")
        parts.append(f"{len(self.micro_batches)} of {self.num_micro_batches} micro-batches went wrong")
        return ", ".join(parts[:2]) + ": " + "; ".join(parts[2:])


def find(engine: Engine, replay: Callable[[], Tensor], random_states: Table | None = None) -> Origin:
    """Replay a step and say where it first went wrong. Called on every rank; gradients are worthless afterwards.

    replay: the step's forward and backward pass, as `forward_backward`; returns this rank's losses. random_states: as `get_random_states` gave them
    before the step, where dropout drew from them; afterwards they are what they are now.
    """
    now = get_random_states()
    if random_states is not None:
        put_random_states(random_states)
    for chunk in engine.model:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    watch = Watch(engine)
    with watch.listening(), _gradients_kept_apart(engine, watch.see_gradients):
        losses = replay()
    _, usable = engine.optimizer.measured(losses)
    put_random_states(now)
    return _judged(engine.mesh, watch, repeated=not bool(usable))


def get_random_states() -> Table:
    """What dropout draws from next, on this rank: a few kilobytes, and no wait for the device."""
    return {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def put_random_states(states: Table) -> None:
    """Draw from these again."""
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


class Watch:
    """Looks at every tensor that this rank's modules take, give, and are given gradients of. sights: the first of each micro-batch and chunk."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.mesh = engine, engine.mesh
        self.chunks = [unwrap(chunk) for chunk in engine.model]
        self.sights: dict[tuple[int, int], Sight] = {}
        self.gradients: list[str] = []
        self.largest: tuple[float, str] | None = None
        self.weights = [name for index, chunk in enumerate(self.chunks) for name in self._broken(index, chunk, recurse=True)]
        self._drawn = [0] * len(self.chunks)
        self._names = [{id(module): _numbered(name, chunk) for name, module in chunk.named_modules()} for chunk in self.chunks]
        self._now, self._order = (0, 0, False), 0
        self._before: str | None = None

    @property
    def num_micro_batches(self) -> int:
        """Of this rank."""
        return self._drawn[0]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, everything is looked at. megatron-core's schedules are unaware of it."""
        with ExitStack() as hooks:
            for index, chunk in enumerate(self.chunks):
                hooks.callback(chunk.register_forward_pre_hook(self._begin(index), prepend=True).remove)
                for module in chunk.modules():
                    hooks.callback(module.register_forward_pre_hook(self._taken(index), with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(self._given(index), with_kwargs=True).remove)
                for name, weight in chunk.named_parameters():
                    if weight.requires_grad:
                        hooks.callback(weight.register_hook(self._weight_gradient(index, name)).remove)
            yield

    def see_gradients(self) -> None:
        """Look at the whole step's gradients of this rank, before they are summed over ranks."""
        for chunk in self.chunks:
            for name, weight in chunk.named_parameters():
                gradient = getattr(weight, "main_grad", None)
                if gradient is None or not weight.requires_grad:
                    continue
                largest = float(gradient.abs().max())
                if not bool(gradient.isfinite().all()):
                    self.gradients.append(_numbered(name, chunk))
                elif self.largest is None or largest > self.largest[0]:
                    self.largest = largest, _numbered(name, chunk)

    def _begin(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self._enter(index, self._drawn[index], backward=False)
            self._drawn[index] += 1

        return hook

    def _enter(self, index: int, micro_batch: int, backward: bool) -> None:
        self._now, self._order, self._before = (index, micro_batch, backward), 0, None

    def _taken(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self._look(_tensors((args, kwargs)), "input", module)

        return hook

    def _given(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._look(_tensors(output), "activation", module, kwargs.get("weight"))
            micro_batch = self._now[1]

            def back(gradient: Tensor) -> None:
                """The gradient of what a chunk gives, the first of its backward pass, says which micro-batch this is."""
                if self._now != (index, micro_batch, True):
                    self._enter(index, micro_batch, backward=True)
                self._look(gradient, "gradient", module)

            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(back)

        return hook

    def _weight_gradient(self, index: int, name: str) -> Callable[[Tensor], None]:
        chunk = self.chunks[index]
        module, weight = chunk.get_submodule(name.rpartition(".")[0]), chunk.get_parameter(name)

        def hook(gradient: Tensor) -> None:
            if not getattr(weight, "grad_added_to_main_grad", False):  # else a stand-in, never written: `see_gradients` looks at the true one
                self._look(gradient, "weight gradient", module, name=name)

        return hook

    def _look(self, seen: Tensor | list[Tensor], what: str, module: Any, weight: Any = None, name: str | None = None) -> None:
        index, micro_batch, _ = self._now
        if (micro_batch, index) in self.sights:  # all else follows from it
            return
        self._order += 1
        called = _numbered(name, self.chunks[index]) if name is not None else self._names[index].get(id(module), "?") or "the model"
        for tensor in [seen] if isinstance(seen, Tensor) else seen:
            if not bool(tensor.isfinite().all()):
                weights = [] if what not in ("activation", "input") else self._broken(index, module, recurse=False, lent=weight)
                self.sights[micro_batch, index] = self._sight(tensor, what, called, weights)
                return
        self._before = f"{NOUNS[what]} {called}"

    def _sight(self, tensor: Tensor, what: str, module: str, weights: list[str]) -> Sight:
        index, micro_batch, backward = self._now
        place, count, value, largest = account(tensor.detach())
        return Sight(
            rank=self.mesh.rank,
            micro_batch=micro_batch * self.mesh.plan.dp + self.mesh.dp_rank,
            backward=backward,
            stage=index * self.mesh.plan.pp + self.mesh.pp_rank,
            order=self._order,
            what=what,
            module=module,
            before=self._before,
            shape=list(tensor.shape),
            index=place,
            count=count,
            value="NaN" if value != value else "infinity" if value > 0 else "-infinity",
            largest=largest,
            weights=weights,
        )

    def _broken(self, index: int, module: Any, recurse: bool, lent: Any = None) -> list[str]:
        """Weights of a module that are not finite; lent: one that it is given, as the LM head is the embedding's."""
        chunk = self.chunks[index]
        names = {id(weight): _numbered(name, chunk) for name, weight in chunk.named_parameters()}
        weights = [*module.parameters(recurse=recurse), *([lent] if isinstance(lent, Tensor) else [])]
        return [names.get(id(weight), "the embedding's weight") for weight in weights if not bool(weight.isfinite().all())]


@contextmanager
def _gradients_kept_apart(engine: Engine, see: Callable[[], None]) -> Iterator[None]:
    """Inside, gradients are summed over ranks after the last backward pass, never during it, and `see` is called before that."""
    config, ddp = engine.model[0].config, engine.model[0].ddp_config
    before = config.finalize_model_grads_func, config.grad_sync_func, ddp.overlap_grad_reduce

    def finish(*args: Any, **kwargs: Any) -> None:
        see()
        before[0](*args, **kwargs)

    for chunk in engine.model:
        assert chunk.ddp_config is ddp, "one for all chunks"
    config.finalize_model_grads_func, config.grad_sync_func, ddp.overlap_grad_reduce = finish, None, False
    try:
        yield
    finally:
        config.finalize_model_grads_func, config.grad_sync_func, ddp.overlap_grad_reduce = before


def _judged(mesh: Mesh, watch: Watch, repeated: bool) -> Origin:
    """What all ranks saw, put together."""
    place = {"rank": mesh.rank, "tp": mesh.tp_rank, "pp": mesh.pp_rank, "cp": mesh.cp_rank, "dp": mesh.dp_rank}
    largest = None if watch.largest is None else (*watch.largest, mesh.rank)
    own = place, list(watch.sights.values()), watch.weights, watch.gradients, largest
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    sights = [sight for _, seen, _, _, _ in everyone for sight in seen]
    first = min((sight.key for sight in sights), default=None)
    earliest = [sight for sight in sights if sight.key == first]
    return Origin(
        repeated=repeated,
        sights=[sight for sight in earliest if sight.weights] or earliest,  # a sum over ranks is wrong on all of them, the weight on one
        micro_batches=sorted({sight.micro_batch for sight in sights}),
        num_micro_batches=watch.num_micro_batches * mesh.plan.dp,
        places=[one[0] for one in everyone],
        num_layers=watch.chunks[0].config.num_layers,
        weights={one[0]["rank"]: one[2] for one in everyone if one[2]},
        gradients={one[0]["rank"]: one[3] for one in everyone if one[3]},
        largest=max((one[4] for one in everyone if one[4] is not None), default=None),
        fixed_order=torch.are_deterministic_algorithms_enabled(),
    )


def account(tensor: Tensor) -> tuple[list[int], int, float, float | None]:
    """Where the first number of a tensor is that is not finite, how many there are, that number, and the largest of the others.

    Makes nothing larger than the tensor: a list of places would be many times as large, on a device that training fills.
    """
    wrong = ~tensor.isfinite()
    first = int(wrong.flatten().byte().argmax())  # the first of the largest
    place: list[int] = []
    for size in reversed(tensor.shape):
        first, here = divmod(first, size)
        place.insert(0, here)
    count = int(wrong.sum())
    largest = float(tensor.abs().masked_fill_(wrong, 0).max()) if count < tensor.numel() else None
    return place, count, float(tensor[tuple(place)]), largest


def _tensors(found: Any) -> list[Tensor]:
    """Numbers with a fraction, anywhere in arguments or results. Of plain tensors: what libraries make of them may not be looked into."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, tuple | list):
        return [tensor for one in found for tensor in _tensors(one)]
    plain = type(found) is Tensor and found.is_floating_point()
    return [found] if plain else []


def _numbered(name: str, chunk: Any) -> str:
    """A module's or weight's name in the whole model: a stage's layers are numbered from its own first."""
    head, found, rest = name.partition("decoder.layers.")
    number, dot, tail = rest.partition(".")
    if not found or head or not number.isdigit():
        return name
    return f"{found}{chunk.decoder.layers[int(number)].layer_number - 1}{dot}{tail}"


def _layer(module: str) -> int | None:
    number = module.removeprefix("decoder.layers.").partition(".")[0]
    return int(number) if module.startswith("decoder.layers.") and number.isdigit() else None


def _place(place: Table) -> str:
    return f"rank {place['rank']} (tp {place['tp']}, pp {place['pp']}, cp {place['cp']}, dp {place['dp']})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
