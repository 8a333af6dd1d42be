"""A micro-batch's forward and backward pass as a CUDA graph: recorded once, then started as one piece of work instead of thousands of kernels, each
of which the host would start by itself. For models so small that the device waits for its host.

Owns: the micro-batches of a step without a pipeline, one after the other, gradients summed in DDP's buffers and finished as megatron-core's schedule
does it; all that a graph knows by its address, which it keeps alive; and capturing anew where weights or gradients lie elsewhere than they did.
Not in a graph: reading, exchanges between ranks, the optimizer. Eager all the same: the first steps, evaluation, the replay of a step that went
wrong, for which the memory of graphs is given back (`Engine.make_room`). Refuses nothing: `recipe` has refused what cannot be recorded.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_prism.engine import watchdog
from megatron_prism.engine.data import MicroBatch
from megatron_prism.engine.fp8_params import stored, transposes
from megatron_prism.engine.loss import masked_loss
from megatron_prism.engine.stragglers import Clock
from megatron_prism.errors import UserError

WARM_STEPS = 2
"""taken eagerly first: kernels are chosen and compiled, workspaces and FP8 copies of weights made"""
SPAN = "micro-batch"
"""what `config.timers` is told of a pass: forward and backward cannot be told apart"""


@dataclass(frozen=True)
class Sums:
    """Of a step's micro-batches on this rank, at one address for good. by_source: float64 [sources, 2], losses and tokens; num_tokens: int32 []."""

    by_source: Tensor
    num_tokens: Tensor

    def clear(self) -> None:
        """A step begins."""
        self.by_source.zero_()
        self.num_tokens.zero_()


class MicroBatchGraphs:
    """What `train_step` takes gradients by in place of megatron-core's schedule. One of it belongs to one engine.

    DDP must be built inside `beside`: the nodes that add up gradients belong to the stream on which they were made, and a capture has one stream.
    On a CPU every step is eager.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.steps = 0
        self.sums: Sums | None = None
        self.inputs: MicroBatch | None = None
        self.graphs: dict[bool, Any] = {}
        """by whether FP8 copies of weights are made in it: once a step, in its first micro-batch"""
        self.kept: list[Any] = []
        self.addresses: Callable[[], list[int]] = list
        self.captured_at: list[int] = []

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream of the captures, after what the current stream has been given and before what it is given next."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def forward_backward(
        self, model: DistributedDataParallel, batches: Iterator[MicroBatch], num_microbatches: int, num_sources: int, clock: Clock
    ) -> Tensor:
        """This rank's micro-batches of a step, and its gradients finished; loss sums and token counts of its samples, float64 [sources, 2].

        clock: of whole passes, which hold no exchange; a capture, which the host alone works for, is not in it.
        """
        if self.sums is None:
            by_source = torch.zeros(num_sources, 2, dtype=torch.float64, device=self.device)
            self.sums = Sums(by_source, torch.zeros((), dtype=torch.int, device=self.device))
        if self.graphs and self.addresses() != self.captured_at:
            self.forget()
        self.sums.clear()
        timers = model.config.timers
        for number in range(num_microbatches):
            watchdog.beat("reading a micro-batch")
            with _span(timers, "forward-compute"):  # under megatron-core's schedule that holds the reading too
                batch = next(batches)
            watchdog.beat("forward and backward")
            self._prepare(model, batch, self.sums, is_first=number == 0)
            with clock.forward(), _span(timers, SPAN):
                self._run(model, batch, self.sums, is_first=number == 0)
        self.steps += 1
        finish: Any = model.config.finalize_model_grads_func
        finish([model], self.sums.num_tokens.clone())
        return self.sums.by_source.clone()

    def describe(self, dp: int) -> str:
        """For people, in one line. dp: data-parallel ranks."""
        said = f"CUDA graphs: micro-batches are captured in step {WARM_STEPS + 1} of this start and replayed from there"
        return said if dp == 1 else f"{said}; sums of gradients and the gathering of weights do not overlap with them"

    def forget(self) -> None:
        """Give the graphs' memory back to the device; the next step captures anew."""
        self.graphs.clear()
        self.kept.clear()
        self.inputs = None
        if self.stream is not None:
            torch.cuda.empty_cache()

    def _prepare(self, model: DistributedDataParallel, batch: MicroBatch, sums: Sums, is_first: bool) -> None:
        """Capture what this micro-batch is going to replay, where nothing is captured yet."""
        if self._is_eager:
            return
        casts_weights = _casts_weights(model, is_first)
        if casts_weights not in self.graphs:
            self.graphs[casts_weights] = self._capture(model, self._put(batch), sums, is_first)

    @property
    def _is_eager(self) -> bool:
        return self.stream is None or self.steps < WARM_STEPS

    def _run(self, model: DistributedDataParallel, batch: MicroBatch, sums: Sums, is_first: bool) -> None:
        if self._is_eager:
            with self.beside():
                one_pass(model, batch, sums, is_first)
            return
        self._put(batch)
        self.graphs[_casts_weights(model, is_first)].replay()

    def _put(self, batch: MicroBatch) -> MicroBatch:
        """The batch, where graphs read it."""
        if self.inputs is None:
            self.inputs = replace(batch, **{name: getattr(batch, name).clone() for name in batch.__dataclass_fields__})
        else:
            for name in batch.copied:
                getattr(self.inputs, name).copy_(getattr(batch, name), non_blocking=True)
        return self.inputs

    def _capture(self, model: DistributedDataParallel, inputs: MicroBatch, sums: Sums, is_first: bool) -> Any:
        """A pass, recorded and not run. Both graphs use one pool of memory: they never run at once, and leave nothing in it for each other."""
        torch.cuda.synchronize(self.device)  # a fault of work that was given before is raised here, and is no fault of the capture
        graph: Any = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.values()), None)
        # other threads pin memory and wait for events meanwhile, which "global" would take for a part of the pass
        recording: Any = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        with _collected():
            try:
                with recording:
                    one_pass(model, inputs, sums, is_first)
            except RuntimeError as error:
                if not is_of_capture(error):
                    raise
                raise UserError(f"cuda_graphs=true: this model's pass cannot be captured here ({error}); set cuda_graphs=false") from error
        self.kept += known_by_address(model)
        self.addresses = addresses_of(model)
        self.captured_at = self.addresses()
        return graph


def one_pass(model: DistributedDataParallel, batch: MicroBatch, sums: Sums, is_first: bool) -> None:
    """Forward and backward of one micro-batch: gradients go to DDP's buffers, losses and tokens to the sums. Waits for nothing."""
    if is_first:
        model.set_is_first_microbatch()
    losses = model(batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=batch.loss_mask)
    loss, num_tokens, report = masked_loss(batch, len(sums.by_source))(losses)
    sums.by_source.add_(report["by_source"])
    sums.num_tokens.add_(num_tokens)
    scaled: Any = model.config.grad_scale_func
    scaled(loss).backward()


def is_of_capture(error: BaseException) -> bool:
    """Whether it says that something may not be captured: CUDA's cudaErrorStreamCapture... ("... when stream is capturing") and torch's own words.

    A device that failed, or that has no memory left, makes the capture fail too: the first RuntimeError of a chain counts.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    first = next((one for one in reversed(chain) if isinstance(one, RuntimeError)), error)
    return not isinstance(first, torch.OutOfMemoryError) and "captur" in str(first).lower()


def draw_nothing(chunk: torch.nn.Module) -> None:
    """Have TransformerEngine's attention not set aside the state of random numbers around dropout that there is not: a capture may not touch it."""
    for module in chunk.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = nullcontext


def _casts_weights(model: DistributedDataParallel, is_first: bool) -> bool:
    return is_first and model.config.fp8 is not None


def known_by_address(model: torch.nn.Module) -> list[Any]:
    """What a pass reads or writes besides weights, gradients, inputs and sums, and others may replace: FP8 copies of weights (an evaluation drops
    their transposes), FP8 scales, the table of rotary angles (a longer text brings a longer one), and transposes of weights in FP8 alone.
    """
    found: list[Any] = [*transposes(model.parameters())]
    for module in model.modules():
        found += [vars(copy).copy() for copy in getattr(module, "_fp8_workspaces", {}).values()]
        found += [dict(getattr(module, name)) for name in ("quantizers", "fp8_meta") if hasattr(module, name)]
        found.append(getattr(module, "_table", None))
    return found


def addresses_of(model: torch.nn.Module) -> Callable[[], list[int]]:
    """What tells where weights, transposes of FP8 ones, gradients and the state of delayed scaling lie: a moment's work, for every step."""
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    metas = [module.fp8_meta for module in model.modules() if hasattr(module, "fp8_meta")]

    def look() -> list[int]:
        tensors = [*map(stored, weights), *transposes(weights), *(weight.main_grad for weight in trained)]
        scalings = [meta[key] for meta in metas for key in ("scaling_fwd", "scaling_bwd") if key in meta]
        tensors += [getattr(scaling, name) for scaling in scalings for name in ("scale", "amax_history") if hasattr(scaling, name)]
        return [tensor.data_ptr() for tensor in tensors]

    return look


@contextmanager
def _collected() -> Iterator[None]:
    """No garbage, and nobody who collects it inside: what frees a graph may not run while another is captured."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _span(timers: Any, name: str) -> Iterator[None]:
    """As megatron-core's schedule times its parts."""
    if timers is None:
        yield
        return
    timers(name, log_level=2).start()
    yield
    timers(name).stop()
