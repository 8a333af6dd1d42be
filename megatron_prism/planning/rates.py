"""What a GPU does in a second, by kind of work: measured on H200s, or derived from that by a stated rule.

Owns the figures and the choice between them; each says where it comes from: a figure of docs/benchmarks.md ("bench"), a product or kernel timed alone
on an H200 ("alone"; docs/plan.md has these), or one run of tests/planning/measured_runs.toml that it was fitted to ("fitted"). Refuses a GPU without
rates. The times that they predict are held to every other run of that file.
"""

from dataclasses import dataclass, replace

from megatron_prism.errors import UserError

COOL, WARM = 785e12, 741e12
"""an 8192-cube's bf16 product on a cool H200, and after minutes of steps, when power bounds it (bench, "Speed on one and two H200s")"""
SUSTAINED = WARM / COOL
MEMORY_OF_H100 = 3.35 / 4.8
"""the two GPUs' memory bandwidth by NVIDIA's data sheets; their products are the same"""
KNOWN = ("h200", "h100")
ORDER = ("products", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "attention_forward", "attention_backward")


@dataclass(frozen=True)
class Rates:
    """Of one GPU: FLOP/s, bytes/s, and for the scan token-channels/s."""

    name: str = "H200"
    note: str = "measured on H200s"
    """whether measured, or by which rule not"""
    products: float = 724e12 * SUSTAINED
    """bf16 products within a step (bench: 724 TFLOP/s in a profile of two steps)"""
    fp8_delayed: float = 1253e12 * SUSTAINED
    """FP8 products with their casts (alone: a linear layer of 4,096 x 28,672 over 8,192 tokens, forward and backward)"""
    fp8_tensorwise: float = 1121e12 * SUSTAINED
    """(alone)"""
    fp8_blockwise: float = 937e12 * SUSTAINED
    """(alone)"""
    attention_forward: float = 575e12
    """cuDNN's causal core at heads of 128 (bench: the same profile)"""
    attention_backward: float = 457e12
    """of 2.5 times the forward FLOPs, as its first product is made again (bench: the same profile)"""
    scan: float = 8192 * 8192 / 2.35e-3
    """Mamba-2's scan, forward and backward (fitted: Nemotron-H-8B's first 13 layers in bf16; alone, with the host's launches, it took 5.70 ms)"""
    scan_forward_share: float = 1.67 / 5.70
    """of it (alone: 1.67 and 4.03 ms, chunks of 128)"""
    convolution: float = 2231e9
    """bytes of the causal convolution (alone: 8,192 tokens of 10,240 channels in 0.150 ms)"""
    memory: float = 4.2e12
    """bytes that elementwise kernels and AdamW move (bench: "the update moves 60 GB at 4.2 TB/s")"""
    nvlink: float = 174e9
    """bytes a GPU takes in while ranks of a node exchange (fitted: 8 layers of LLaMA-3.1-8B with tp=2, without overlap)"""
    overlap_hides: float = 0.26
    """share of tp's exchange that tp_comm_overlap hides (fitted: the same run with it)"""
    host: float = 360e9
    """bytes of offloaded activations a second of added time: most of the copying is hidden (fitted: 4 layers of LLaMA-3.1-8B, offloaded)"""
    step_overhead_seconds: float = 4.7e-3
    """a step's time without a kernel (bench: "the device is idle for 4.7")"""

    def fp8_products(self, recipe: str) -> float:
        """FP8 products by a recipe's name."""
        return float(getattr(self, f"fp8_{recipe}"))


H200 = Rates()


def find(gpu: str, matmul_tflops: float | None = None) -> Rates:
    """The rates of a GPU by name ("h200"). Errors: UserError for one without.

    matmul_tflops: the bf16 rate of a product of 8192-cubes that was measured on it (`prism bench` does, before each case); an H200's rates are then
    scaled by that of a cool H200's, all but exchanges and the host's.
    """
    name = gpu.lower().removeprefix("nvidia").strip(" -_")
    if matmul_tflops is not None:
        share = matmul_tflops * 1e12 / COOL
        note = f"not measured: an H200's, times {share:.2f} by the rate of a bf16 product ({matmul_tflops:g} of {COOL / 1e12:.0f} TFLOP/s)"
        return _scaled(H200, (*ORDER, "scan", "convolution", "memory"), share, name.upper(), note)
    if name == "h200":
        return H200
    if name == "h100":
        note = f"not measured: an H200's products and attention, bytes at {MEMORY_OF_H100:.2f} of its rate (3.35 of 4.8 TB/s)"
        return _scaled(H200, ("scan", "convolution", "memory"), MEMORY_OF_H100, "H100", note)
    raise UserError(
        f"--gpu {gpu}: no rates for this GPU ({', '.join(KNOWN)} have some); measure the bf16 rate of its products with `prism bench` and give it: "
        f"--gpu {gpu} --tflops N"
    )


def _scaled(rates: Rates, names: tuple[str, ...], share: float, name: str, note: str) -> Rates:
    return replace(rates, name=name, note=note, **{key: getattr(rates, key) * share for key in names})
