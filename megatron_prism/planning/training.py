"""What of a training recipe decides its bytes and its repeated work: precision, recomputation, the types of the optimizer's states, FP8."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_prism.config import Fp8Config, OptimizerConfig
from megatron_prism.families.components import Trainable
from megatron_prism.planning.layout import ParallelPlan


@dataclass(frozen=True)
class Training:
    """The settings; the defaults are a recipe's."""

    bf16: bool = True
    recompute: Literal["selective", "full"] | None = None
    recompute_layers: int | None = None
    """with recompute="full": the first so many layers of each stage (chunk, with vpp); None: all"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fp8: Fp8Config | None = None
    keep_attention: bool = False
    """with recompute="full": attention's output is kept, its core runs once"""
    offload_activations: bool = False
    """with recompute="full": what layers keep waits in host memory"""
    trainable: Trainable = "all"
    cuda_graphs: bool = False
    """passes are replayed whole: no exchange runs beside them, and the room of one stays taken while the model is validated"""

    @property
    def value_bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def gradient_bytes(self) -> int:
        """Of a weight's gradient."""
        return 2 if self.bf16 and self.optimizer.gradients == "bf16" else 4

    @property
    def state_bytes(self) -> int:
        """Of a weight's master and moments. fp32 weights are their own masters."""
        return self.optimizer.state_bytes if self.bf16 else 8

    @property
    def fp8_master_bytes(self) -> int:
        """Of an FP8 layer's linear weight beyond `state_bytes`: an FP8 weight is no half of its master, which is whole."""
        return 2 if self.fp8_alone and self.optimizer.split_master else 0

    @property
    def fp8_alone(self) -> bool:
        """Whether FP8 layers' linear weights are in FP8 and nothing else: gathered in 1 byte."""
        return self.fp8 is not None and self.fp8.params

    @property
    def fp8_cast_bytes(self) -> int:
        """That an update moves for such a weight beyond AdamW's: its master read twice, FP8, the transpose read and written; no bf16 weight."""
        return 0 if not self.fp8_alone else 11 if self.optimizer.split_master else 9

    @property
    def fp8_weight_bytes(self) -> int:
        """Of an FP8 layer's linear weight beyond `value_bytes`: its copy and the transpose; with fp8.params they take the bf16 weight's place."""
        return 0 if self.fp8 is None or self.fp8_alone else 2

    def in_fp8(self, layer: int, num_layers: int) -> bool:
        """Whether a layer (from 0) multiplies in FP8."""
        return self.fp8 is not None and self.fp8.bf16_layers_at_start <= layer < num_layers - self.fp8.bf16_layers_at_end

    def is_recomputed(self, position: int) -> bool:
        """Whether the layer at a position (from 0) of its chunk runs again in the backward pass, whole."""
        return self.recompute == "full" and (self.recompute_layers is None or position < self.recompute_layers)

    def recomputed_share(self, plan: ParallelPlan, num_layers: int) -> float:
        """Share of all layers that run again."""
        chunks = [len(layers) // plan.num_chunks for layers in plan.stage_layers(num_layers)]
        return plan.num_chunks * sum(self.is_recomputed(position) for size in chunks for position in range(size)) / num_layers

    def describe(self) -> str:
        """Bytes of a weight by kind, in words."""
        copies = " (and 2 of FP8 copies in the layers)" if self.fp8_weight_bytes else ""
        fp8 = " (FP8 and its transpose in the layers)" if self.fp8_alone else copies
        masters = f" ({self.state_bytes + self.fp8_master_bytes} in the layers)" if self.fp8_master_bytes else ""
        states = f"{self.state_bytes} of optimizer{masters} over the data-parallel ranks"
        return f"{self.value_bytes} a weight{fp8}, {self.gradient_bytes} a gradient, {states}"
