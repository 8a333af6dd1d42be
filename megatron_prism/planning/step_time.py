"""Seconds of a training step, term by term, from what a GPU does in a second (`rates`). Pure arithmetic, no torch.

A pipeline's stage works through its micro-batches one after the other. The step takes what the slowest stage takes, the pipeline's fill and drain,
what of the gradients' exchange no backward pass hides, and the optimizer. Each kind of work is FLOPs over a rate, or bytes that its kernels move over
a bandwidth. docs/plan.md: the formulas, what they were checked against, and what was never measured (pipelines, networks, more than two GPUs).

Not counted: validation, checkpoints, restarts, waiting for data; a host that cannot launch kernels fast enough, as with a hybrid of three
billion parameters, or FP8 at that size, at one micro-batch of 8,192 tokens.
"""

from dataclasses import dataclass, fields

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.flops import visible_keys
from megatron_prism.planning.layout import ParallelPlan
from megatron_prism.planning.parameters import layer_parameters, linear_parameters, local_bc_size
from megatron_prism.planning.rates import H200, Rates
from megatron_prism.planning.training import Training

GPUS_PER_NODE = 8
NETWORK_GBPS = 400.0
"""of a GPU's own network adapter, where nothing else is said (an assumption: one adapter of 400 Gb/s for each GPU of a node)"""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by kind of work, which add up to it."""

    products: float = 0.0
    """of the layers' linear projections, forward and backward"""
    attention: float = 0.0
    scan: float = 0.0
    """Mamba-2's scan and convolution"""
    elementwise: float = 0.0
    """norms, residual additions, rotation, the MLP's activation"""
    lm_head: float = 0.0
    recompute: float = 0.0
    tp_exchange: float = 0.0
    cp_exchange: float = 0.0
    offload: float = 0.0
    pp_exchange: float = 0.0
    pp_bubble: float = 0.0
    dp_exchange: float = 0.0
    """what the last backward and the first forward pass do not hide; all of it with CUDA graphs"""
    optimizer: float = 0.0
    """AdamW, the gradients' norm, clearing them"""
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Machine:
    """What the step runs on: a GPU's rates, and the network between nodes of `GPUS_PER_NODE`."""

    rates: Rates = H200
    network_gbps: float = NETWORK_GBPS
    """gigabits a second of each GPU"""

    def exchange_rate(self, span: int, members: int = 1) -> float:
        """Bytes/s of a GPU in a group that reaches over `span` neighbouring ranks, `members` of it on each node where it leaves one.

        A ring crosses between two nodes once, over the adapters of all of its members there.
        """
        if span <= GPUS_PER_NODE:
            return self.rates.nvlink
        return min(self.rates.nvlink, max(members, 1) * self.network_gbps * 1e9 / 8)


@dataclass(frozen=True)
class _Work:
    """One micro-batch of one stage: seconds forward and backward."""

    products: tuple[float, float] = (0.0, 0.0)
    attention: tuple[float, float] = (0.0, 0.0)
    scan: tuple[float, float] = (0.0, 0.0)
    elementwise: tuple[float, float] = (0.0, 0.0)
    tp_exchange: tuple[float, float] = (0.0, 0.0)
    cp_exchange: tuple[float, float] = (0.0, 0.0)
    again: float = 0.0
    """of the forward pass, where it is repeated"""
    offload: float = 0.0

    def __add__(self, other: "_Work") -> "_Work":
        pairs = {name: tuple(a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)) for name in _PAIRS}
        return _Work(**pairs, again=self.again + other.again, offload=self.offload + other.offload)

    def side(self, backward: bool) -> float:
        """All of the forward or the backward pass."""
        return sum(getattr(self, name)[backward] for name in _PAIRS) + (self.again + self.offload if backward else 0.0)


_PAIRS = ("products", "attention", "scan", "elementwise", "tp_exchange", "cp_exchange")


def step_time(
    model: ModelConfig, plan: ParallelPlan, seq_len: int, training: Training, machine: Machine | None = None, tp_comm_overlap: bool = False
) -> StepTime:
    """Of one step of a bf16 or FP8 run on GPUs."""
    step = _Step(model, plan, seq_len, training, machine or Machine(), tp_comm_overlap)
    return max((step.stage(stage) for stage in range(plan.pp)), key=lambda found: found.total)


@dataclass(frozen=True)
class _Step:
    model: ModelConfig
    plan: ParallelPlan
    seq_len: int
    training: Training
    machine: Machine
    tp_comm_overlap: bool

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a rank."""
        return self.seq_len * self.plan.micro_batch // self.plan.cp

    def stage(self, stage: int) -> StepTime:
        """The step as this stage alone would set its pace."""
        plan, rates, layers = self.plan, self.machine.rates, self.plan.stage_layers(self.model.num_layers)[stage]
        per_chunk, work = len(layers) // plan.num_chunks, _Work()
        for position, layer in enumerate(layers):
            again = self.training.is_recomputed(position % per_chunk)
            for symbol in self.model.layer_symbols[layer]:
                work += self._layer(symbol, self.training.in_fp8(layer, self.model.num_layers), again)
        head = self._head() if stage == plan.pp - 1 else 0.0
        sends = self._pipeline_exchange() if plan.pp > 1 else 0.0
        one, count = work.side(False) + work.side(True) + head + sends, plan.num_microbatches
        weights = sum(layer_parameters(self.model, symbol, plan.tp) for layer in layers for symbol in self.model.layer_symbols[layer])
        weights += self._table() * ((stage == 0) + (stage == plan.pp - 1 and not (stage == 0 and self.model.share_embeddings_and_output_weights)))
        alone = [layer for layer in layers if self.training.fp8_alone and self.training.in_fp8(layer, self.model.num_layers)]
        in_fp8 = sum(linear_parameters(self.model, symbol, plan.tp) for layer in alone for symbol in self.model.layer_symbols[layer])
        return StepTime(
            **{name: count * sum(getattr(work, name)) for name in _PAIRS},
            recompute=count * work.again,
            offload=count * work.offload,
            lm_head=count * head,
            pp_exchange=count * sends,
            pp_bubble=(plan.pp - 1) / plan.num_chunks * one,
            dp_exchange=self._reduction(weights, in_fp8, work),
            optimizer=self._optimizer(weights, in_fp8),
            overhead=rates.step_overhead_seconds,
        )

    def _layer(self, symbol: str, fp8: bool, again: bool) -> _Work:
        rates, training = self.machine.rates, self.training
        rate = rates.fp8_products(training.fp8.recipe) if fp8 and training.fp8 is not None else rates.products
        product = 2 * self.tokens * linear_parameters(self.model, symbol, self.plan.tp) / rate
        trained = training.trainable == "all" or symbol == "*"
        attention, scan = (self._attention(), (0.0, 0.0)) if symbol == "*" else ((0.0, 0.0), self._scan() if symbol == "M" else (0.0, 0.0))
        elementwise, tp, cp = self._elementwise(symbol), self._tp_exchange(), self._cp_exchange(symbol)
        kept = again and training.keep_attention
        repeated = product + elementwise[0] + scan[0] + tp[0] + (0.0 if kept and symbol == "*" else attention[0] + cp[0]) if again else 0.0
        repeated += attention[0] if training.recompute == "selective" else 0.0
        return _Work(
            (product, (2 if trained else 1) * product), attention, scan, elementwise, tp, cp, repeated,
            self._offload(symbol) if again and training.offload_activations else 0.0,
        )  # fmt: skip

    def _attention(self) -> tuple[float, float]:
        """Causal FLOPs; the backward pass has two and a half times as many, one product again."""
        model, rates = self.model, self.machine.rates
        flops = 4.0 * model.query_size / self.plan.tp * visible_keys(model, self.seq_len, causal=True) * self.tokens
        return flops / rates.attention_forward, 2.5 * flops / rates.attention_backward

    def _scan(self) -> tuple[float, float]:
        mamba, rates = self.model.mamba, self.machine.rates
        assert mamba is not None
        channels = mamba.d_inner // self.plan.tp
        scan, pass_over = self.tokens * channels / rates.scan, 2 * self.tokens * (channels + local_bc_size(self.model, self.plan.tp))
        share = rates.scan_forward_share
        return share * scan + 2 * pass_over / rates.convolution, (1 - share) * scan + 3 * pass_over / rates.convolution

    def _elementwise(self, symbol: str) -> tuple[float, float]:
        """Values read and written. Forward: norm 2 h, residual addition 3 h; backward 6 h; and each kind of layer's own."""
        model, tp = self.model, self.plan.tp
        hidden = model.hidden_size // (tp if self.plan.sp else 1)
        if symbol == "*":
            rotated = model.query_size + model.kv_size if model.position_embedding == "rope" else 0
            own = 2 * (model.query_size + 2 * model.kv_size + rotated)
            forward, backward = own, own
        elif symbol == "-":
            forward, backward = ((3 if model.is_gated else 2) * model.ffn_hidden_size, (5 if model.is_gated else 3) * model.ffn_hidden_size)
        else:
            assert model.mamba is not None
            forward, backward = 3 * model.mamba.d_inner, 5 * model.mamba.d_inner
        bytes_a_value = self.training.value_bytes * self.tokens / self.machine.rates.memory
        return (5 * hidden + forward // tp) * bytes_a_value, (6 * hidden + backward // tp) * bytes_a_value

    def _head(self) -> float:
        """Three products (two where it is frozen) and the loss, which reads the logits twice and overwrites them."""
        rows, products = self.plan.padded_vocab_size // self.plan.tp, 3 if self.training.trainable == "all" else 2
        flops = 2.0 * products * self.tokens * rows * self.model.hidden_size
        return flops / self.machine.rates.products + 3 * 2 * self.tokens * rows / self.machine.rates.memory

    def _table(self) -> int:
        return self.plan.padded_vocab_size // self.plan.tp * self.model.hidden_size

    def _tp_exchange(self) -> tuple[float, float]:
        """Gather and scatter of a sublayer's tokens; backward the gather of its inputs too, for the weights' gradient."""
        tp, rates = self.plan.tp, self.machine.rates
        if tp == 1:
            return 0.0, 0.0
        once = 2 * self.tokens * self.model.hidden_size * (tp - 1) / tp / self.machine.exchange_rate(tp)
        once *= 1 - rates.overlap_hides if self.tp_comm_overlap else 1.0
        return 2 * once, 3 * once

    def _cp_exchange(self, symbol: str) -> tuple[float, float]:
        """Keys and values around a ring, backward their gradients with them; or tokens for heads and back, as Mamba-2 does. None of it is hidden:
        cp=2 at 65,536 tokens took longer than half of cp=1 by more than its whole exchange.
        """
        model, plan, mamba = self.model, self.plan, self.model.mamba
        if plan.cp == 1 or symbol == "-":
            return 0.0, 0.0
        rate = self.machine.exchange_rate(plan.tp * plan.cp, GPUS_PER_NODE // plan.tp)
        away, values = (plan.cp - 1) / plan.cp, 2 * self.tokens / plan.tp / rate
        if symbol == "M":
            assert mamba is not None
            once = values * (mamba.in_proj_size + mamba.d_inner) * away
            return once, once
        if plan.cp_comm_type == "a2a":
            once = values * 2 * (model.query_size + model.kv_size) * away
            return once, once
        once = values * 2 * model.kv_size * (plan.cp - 1)
        return once, 2 * once

    def _offload(self, symbol: str) -> float:
        """Of what a recomputed layer keeps, out and back; a dense layer's input once for both of its sublayers."""
        attention = self.model.query_size if self.training.keep_attention and symbol == "*" else 0
        inputs = self.model.hidden_size if self.model.is_hybrid or symbol == "*" else 0
        return 2 * 2 * self.tokens * (inputs + attention) // self.plan.tp / self.machine.rates.host

    def _pipeline_exchange(self) -> float:
        """Hidden states to the next stage and their gradient back, once for each chunk; none of it is hidden."""
        sent = 2 * self.tokens * self.model.hidden_size // (self.plan.tp if self.plan.sp else 1)
        return 2 * self.plan.num_chunks * sent / self.machine.exchange_rate(self.plan.world_size)

    def _reduction(self, weights: int, in_fp8: int, work: _Work) -> float:
        """Gradients are scattered beside the last backward pass, weights gathered beside the next step's first forward pass; with CUDA graphs, whose
        passes hold no exchange, both after them. in_fp8: weights that are gathered in one byte.
        """
        plan, training = self.plan, self.training
        ranks = plan.dp * plan.cp
        if ranks == 1:
            return 0.0
        rate = self.machine.exchange_rate(plan.tp * ranks, GPUS_PER_NODE // plan.tp)
        away, trained = (ranks - 1) / ranks, self._trained(weights)
        scatter, gather = trained * training.gradient_bytes * away / rate, (trained * training.value_bytes - in_fp8) * away / rate
        if training.cuda_graphs:
            return scatter + gather
        return max(scatter - work.side(True), 0.0) + max(gather - work.side(False), 0.0)

    def _optimizer(self, weights: int, in_fp8: int) -> float:
        """AdamW reads the gradient, its states and a split master's other half, and writes states and weight; norm and clearing of gradients."""
        training, rates, trained = self.training, self.machine.rates, self._trained(weights)
        update = training.gradient_bytes + 2 * training.state_bytes + training.value_bytes * (2 if training.optimizer.split_master else 1)
        own, own_in_fp8 = (count / (self.plan.dp * self.plan.cp) for count in (trained, in_fp8))
        cast = own_in_fp8 * training.fp8_cast_bytes
        return (own * (update + training.gradient_bytes) + trained * training.gradient_bytes + cast) / rates.memory

    def _trained(self, weights: int) -> int:
        if self.training.trainable == "all":
            return weights
        count = sum(symbols.count("*") for symbols in self.model.layer_symbols) // self.plan.pp
        return count * layer_parameters(self.model, "*", self.plan.tp)
