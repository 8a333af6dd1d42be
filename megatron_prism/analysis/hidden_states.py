"""Mean hidden states of a model on sets of inputs, by either backend, kept in the output so that what was computed is not computed again.

    OUTPUT/states/MODEL.SET.KEY.npy      fp32 [points, inputs, width]; KEY: digest of the model, the tokens and how they were computed

Point 0 is what the first layer is given, point i is after the i-th layer, the last one after the final norm: both backends' are the same.
Owns: the transformers backend, what is kept under which name. Refuses: states that are NaN or infinite, by model, set and layer, and says
which weight is, where one is. The engine's backend is `engine.hidden_states`.
Legend: p points, n inputs, h width.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prism import artifact
from megatron_prism.analysis.cka_inputs import Tokens
from megatron_prism.engine import device, merging
from megatron_prism.engine.padded_batches import padded_batches, sum_of_real
from megatron_prism.engine.verify import without_cuda_kernels
from megatron_prism.engine.weights import export_hf
from megatron_prism.errors import UserError
from megatron_prism.evals.models import is_hf_folder
from megatron_prism.temporary import TemporaryFolder

SCHEMA_VERSION = 1
"""of the files, and of what they hold: a change of either computes them anew"""
STATES = "states"
Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
States = NDArray[np.float32]


class Backend(Protocol):
    """A model that can be looked into."""

    def pooled(self, inputs: Sequence[Sequence[int]], batch_tokens: int, advance: Callable[[int], None]) -> Tensor | None:
        """Token ids of each input -> its mean hidden states, fp32 [p, n, h] on the CPU; None on all ranks but 0."""


class Store:
    """The states that an output holds."""

    def __init__(self, output: Path, settings: Sequence[str]) -> None:
        """settings: what else than model and tokens decides the values."""
        self.folder, self.settings = output / STATES, list(settings)

    def path(self, model: str, told_by: Sequence[str], name: str, tokens: Tokens) -> Path:
        """Of a model's states on a set. told_by: the model's place and fingerprint, which alone may miss a change (`evals.models.fingerprint`)."""
        key = json.dumps([SCHEMA_VERSION, *told_by, tokens.digest, *self.settings])
        return self.folder / f"{model}.{name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"

    def write(self, path: Path, states_pnh: States) -> None:
        """Whole or not at all."""
        content = io.BytesIO()
        np.save(content, states_pnh)
        artifact.write_atomic(path, content.getvalue())

    def read(self, path: Path) -> States:
        """Mapped: a layer is read when it is looked at."""
        found: States = np.load(path, mmap_mode="r")
        return found

    def leave_only(self, paths: Sequence[Path]) -> None:
        """Remove what earlier recipes left."""
        for path in self.folder.glob("*.npy"):
            if path not in paths:
                path.unlink()


def check_finite(states_pnh: States, model: str, folder: Path, name: str) -> None:
    """Errors: UserError with the first point and input that is no number, and the weight that is none, where there is one."""
    bad_pn: NDArray[np.bool_] = np.logical_not(np.isfinite(states_pnh).all(axis=2))
    if not bad_pn.any():
        return
    point = int(bad_pn.any(axis=1).argmax())
    place = "the embeddings" if point == 0 else f"layer {point}" if point < len(states_pnh) - 1 else f"layer {point}, with the final norm"
    weight = _bad_weight(folder)
    cause = (
        f"its weight {weight} holds NaN or infinite values: take an earlier checkpoint"
        if weight is not None
        else "its weights are all finite, so the values left the range of the type they are computed in: try precision=fp32"
    )
    raise UserError(
        f"model {model} ({folder}), set {name}: the hidden states of {int(bad_pn[point].sum())} of {bad_pn.shape[1]} inputs are NaN or infinite from "
        f"{place} on; {cause}"
    )


def _bad_weight(folder: Path) -> str | None:
    """The first weight that is not finite, by its Hugging Face name."""
    source = merging.open_parent(folder)
    for entry in source.family.rules(source.model):
        for part, tensor in zip(entry.parts(source.model), source.tensors(entry), strict=True):
            if not torch.isfinite(tensor).all():
                return part.name
    return None


class TransformersStates:
    """A Hugging Face folder as transformers runs it, for `hidden_states`."""

    def __init__(self, folder: Path, precision: Precision, place: torch.device) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with without_cuda_kernels() if place.type == "cpu" else nullcontext():
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], local_files_only=True, trust_remote_code=False)
        self.body, self.place = whole.base_model.to(place).eval(), place  # without the LM head

    @torch.no_grad()
    def pooled(self, inputs: Sequence[Sequence[int]], batch_tokens: int, advance: Callable[[int], None]) -> Tensor:
        """See `Backend`."""
        layers = list(self.body.layers)
        total = torch.zeros(1 + len(layers), len(inputs), self.body.config.hidden_size)
        for batch in padded_batches(inputs, batch_tokens):
            places, lengths = torch.tensor(batch.places), batch.lengths.to(self.place)

            def take(point: int, hidden_bsh: Tensor, places: Tensor = places, lengths: Tensor = lengths) -> None:
                total[point, places] = (sum_of_real(hidden_bsh, lengths) / lengths[:, None]).cpu()

            with _listening(layers, take):
                output = self.body(input_ids=batch.ids.to(self.place), use_cache=False)
            take(len(layers), output.last_hidden_state)
            advance(len(batch.places))
        return total

    def close(self) -> None:
        """Give the model's memory back."""
        del self.body
        if self.place.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _listening(layers: Sequence[Any], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, `take` is given the states at every point but the last."""

    def before_first(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(0, args[0] if args else kwargs["hidden_states"])

    def after(point: int) -> Callable[[Any, Any, Any], None]:
        return lambda layer, args, output: take(point, output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(after(place)) for place, layer in enumerate(layers[:-1], 1)]
    hooks.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def open_transformers(folder: Path, precision: Precision, device_name: device.DeviceName) -> Iterator[Backend]:
    """A checkpoint (by way of an export in the type that is computed in) or a Hugging Face folder; all of it is gone afterwards."""
    with TemporaryFolder("export") as temporary:
        exported = folder if is_hf_folder(folder) else export_hf(folder, temporary.path / "hf", str(DTYPES[precision]).removeprefix("torch."))
        model = TransformersStates(exported, precision, device.choose(device_name))
        try:
            yield model
        finally:
            model.close()
