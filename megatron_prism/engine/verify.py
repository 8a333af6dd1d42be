"""The built-in check of a conversion: fp32 logits of our model against transformers', on one seeded batch.

Both run on the CPU in fp32, one after the other, so memory holds one model at a time (4 bytes a parameter). One process, world of one.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, mcore, parallel
from megatron_prism.engine.model import BuildOptions, Chunk, build
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan

MAX_RELATIVE = 1e-4
"""law 2: fp32 sums in another order differ by about 1e-6"""
BATCH, SEQ_LEN, SEED = 2, 128, 1234


@dataclass(frozen=True)
class Difference:
    """Largest differences of logits: absolute, and relative to the largest reference logit."""

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"largest logits difference: {self.absolute:.3e} absolute, {self.relative:.3e} relative"


def verify(checkpoint: Path, hf_dir: Path, through: torch.dtype | None = None) -> Difference:
    """Compare a checkpoint with a Hugging Face folder. through: round both sides' weights to this type first (a conversion that casts).

    Errors: UserError when the logits differ by more than 1e-4 relative.
    """
    _, model = families.load(hf_dir)
    ids = token_ids(model.vocab_size, model.max_position_embeddings)
    with warnings.catch_warnings():  # megatron-core calls what torch has deprecated
        warnings.simplefilter("ignore")
        found = difference(our_logits(checkpoint, ids, through), transformers_logits(hf_dir, ids, through))
    if not found.relative <= MAX_RELATIVE:
        raise UserError(
            f"{found}; at most {MAX_RELATIVE:g} relative is allowed: {checkpoint} is not the same model as {hf_dir}. "
            "This is a fault of the conversion or of the files: please report it with the model's name"
        )
    return found


def token_ids(vocab_size: int, longest: int) -> Tensor:
    """The seeded batch, [2, up to 128]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab_size, (BATCH, min(SEQ_LEN, longest)), generator=generator)


def difference(ours: Tensor, reference: Tensor) -> Difference:
    """Differences of two tensors of one shape; NaN anywhere gives NaN."""
    absolute = (ours - reference).abs().max().item()
    return Difference(absolute, absolute / reference.abs().max().item())


def our_logits(checkpoint: Path, ids_bs: Tensor, through: torch.dtype | None = None) -> Tensor:
    """fp32 logits [b, s, vocab] of a checkpoint's model, built from its hf/config.json and loaded by megatron-core."""
    started_here = not torch.distributed.is_initialized()
    try:
        chunk = whole_model(checkpoint, ids_bs.shape[1])
        _round(chunk, through)
        positions_bs = torch.arange(ids_bs.shape[1]).expand_as(ids_bs)
        with torch.no_grad():
            logits: Tensor = chunk(ids_bs, positions_bs, None)
    finally:
        if started_here:
            parallel.stop()
    return logits[..., : chunk.vocabulary].float()


def whole_model(checkpoint: Path, seq_len: int) -> Chunk:
    """A checkpoint's model on this CPU alone, fp32, for inference; joins a process group of one where there is none."""
    _, model = families.load(checkpoint / "hf")
    place = device.setup("cpu")
    parallel.start(place)
    plan = make_plan(model, ParallelConfig(), 1, seq_len, global_batch=1, micro_batch=1)
    (chunk,) = build(model, parallel.build_mesh(plan, seed=SEED), BuildOptions(layers="local"), place)
    state = {key: value for key, value in chunk.sharded_state_dict().items() if not key.endswith("_extra_state")}
    chunk.load_state_dict(mcore.load_sharded(state, checkpoint / "sharded"), strict=False)
    return chunk.eval()


def transformers_logits(hf_dir: Path, ids_bs: Tensor, through: torch.dtype | None = None) -> Tensor:
    """fp32 logits [b, s, vocab] of a Hugging Face folder under transformers."""
    model = transformers_model(hf_dir)
    _round(model, through)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_bs, use_cache=False).logits
    return logits.float()


def transformers_model(hf_dir: Path, **options: Any) -> Any:
    """A Hugging Face folder as transformers loads it, fp32, for inference."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with without_cuda_kernels():
        return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True, **options, trust_remote_code=False).eval()


@contextmanager
def without_cuda_kernels() -> Iterator[None]:
    """transformers (5.17) takes these packages when it first reads a Mamba model's module and calls them on the CPU too, where they fail: hidden."""
    packages: dict[str, Any] = dict.fromkeys(("causal_conv1d", "mamba_ssm"))  # None: "not installed", for import
    loaded = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(packages)
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(loaded)


def _round(model: torch.nn.Module, through: torch.dtype | None) -> None:
    """Round the parameters, and only them: a model's own .to() would round rotary frequencies too."""
    if through is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(through).float()
