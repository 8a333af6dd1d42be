"""Loss by position: how well each token of long documents is predicted, by how many tokens stand before it.

    prism stage megatron_prism.evals.positions positions.toml
    OUTPUT/positions.json, positions.svg

A model that uses a long context predicts later tokens no worse than earlier ones; one that was not made for it is lost beyond its length. Documents
are read from their beginning, so that the context of a token is its own document and nothing else, a chunk at a time (`generate/chunks`).
A stage of `prism stage`. Owns: which documents, the buckets, the picture. Refuses: a blend without documents as long as asked for, other tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_prism import artifact
from megatron_prism.config import Block, Positive
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.errors import UserError
from megatron_prism.evals.chart import Axes, Point, lines, picture
from megatron_prism.evals.models import find_model, hf_folder
from megatron_prism.evals.recipe import ModelEntry
from megatron_prism.evals.tokens import TokenStream
from megatron_prism.generate.settings import BackendConfig


class Config(Block):
    """Models and long documents -> loss by position."""

    output: Path
    """folder to write"""
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    """[[models]] tables: name, path"""
    blend: Path
    """prep output, or a blend.toml"""
    split: Literal["validation", "train"] = "validation"
    """train: all of it, for text that was prepared to be measured on"""
    length: Positive = 32768
    """tokens predicted in each document: its first ones"""
    num_documents: Positive | None = 16
    """spread evenly over those that are long enough; none: all of them"""
    buckets: Positive = 16
    """equal parts of the length, a mean for each"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a device"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of weights and activations"""


@dataclass(frozen=True)
class Curve:
    """loss: mean nats per token of each bucket over documents; error: its standard error, each document a draw. ends: of the buckets, in tokens."""

    ends: list[int]
    loss: list[float]
    error: list[float]
    num_documents: int

    def points(self) -> list[Point]:
        """At the middle of each bucket."""
        starts = [0, *self.ends[:-1]]
        return [Point((start + end) / 2, *found) for start, end, *found in zip(starts, self.ends, self.loss, self.error, strict=True)]


def parents(cfg: Config) -> list[Path]:
    """Models and text, as far as they are artifacts."""
    blend = cfg.blend if cfg.blend.is_dir() else cfg.blend.parent
    return [path for path in [*(model.path for model in cfg.models), blend] if (path / artifact.PROVENANCE).is_file()]


def dry_run(cfg: Config) -> None:
    """Print the models and what they would read."""
    for model in cfg.models:
        print(f"model {model.name}: {find_model(model.path)}")
    print(f"{len(documents(cfg))} documents, the first {cfg.length} tokens of each")


def run(cfg: Config) -> Path:
    """Measure every model; returns the finished folder."""
    texts = documents(cfg)
    for model in cfg.models:
        find_model(model.path)
    if artifact.is_current(cfg.output, cfg, parents(cfg)):
        return artifact.left_as_it_is(cfg.output)
    artifact.begin(cfg.output, "positions", cfg, parents(cfg))
    curves = {model.name: _measured(cfg, model, texts) for model in cfg.models}
    content = {name: asdict(curve) for name, curve in curves.items()}
    artifact.write_atomic(cfg.output / "positions.json", json.dumps(content, indent=1) + "\n")
    artifact.write_atomic(cfg.output / "positions.svg", picture(chart(curves)))
    artifact.complete(cfg.output)
    print(f"measured {', '.join(curves)}: {cfg.output / 'positions.svg'}")
    return cfg.output


def documents(cfg: Config) -> list[NDArray[np.int64]]:
    """The first length + 1 tokens of the chosen documents. Errors: UserError where there are none so long."""
    found: list[tuple[TokenStream, int]] = []
    longest = 0
    for manifest in load_blend(cfg.blend).manifests(cfg.split):
        lengths = manifest.document_lengths().astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        longest = max(longest, int(lengths.max(initial=0)))
        stream = TokenStream(manifest)
        found += [(stream, int(start)) for start in starts[lengths > cfg.length]]
    if not found:
        raise UserError(
            f"no document of {cfg.blend} ({cfg.split}) has more than length={cfg.length} tokens, the longest has {longest}: "
            "set length below that, or prepare longer ones"
        )
    wanted = min(len(found), cfg.num_documents or len(found))
    chosen = np.linspace(0, len(found) - 1, wanted).round().astype(int)
    return [stream.read(start, cfg.length + 1) for stream, start in (found[place] for place in chosen)]


def measure(model: Any, texts: Sequence[NDArray[np.int64]], buckets: int, progress: Callable[[int], None] | None = None) -> Curve:
    """A transformers model on documents of one length. progress: called with the number of documents done."""
    rows = []
    for text in texts:
        rows.append(nll(model, text))
        if progress is not None:
            progress(1)
    return by_position(np.stack(rows), buckets)


def by_position(nll_ds: NDArray[np.float64], buckets: int) -> Curve:
    """Means over buckets of s positions, from the losses of d documents. Errors: UserError for more buckets than positions."""
    num_documents, length = nll_ds.shape
    if buckets > length:
        raise UserError(f"buckets={buckets} must be at most length={length}; lower it")
    ends = [length * number // buckets for number in range(1, buckets + 1)]
    means_bd = np.stack([part.mean(axis=1) for part in np.split(nll_ds, ends[:-1], axis=1)])
    error = means_bd.std(axis=1, ddof=1) / np.sqrt(num_documents) if num_documents > 1 else np.zeros(buckets)
    return Curve(ends, means_bd.mean(axis=1).tolist(), error.tolist(), num_documents)


def nll(model: Any, text: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p of each token but the first, in nats. Errors: UserError for tokens that the model does not have."""
    import torch

    from megatron_prism.generate.chunks import logits_of

    if int(text.max()) >= model.config.vocab_size:
        raise UserError(f"the text has token {text.max()}, the model {model.config.vocab_size} tokens: prepare it with the model's tokenizer")
    wanted = torch.from_numpy(text).to(model.device)[1:]
    found = logits_of(model, text[:-1].tolist())
    parts = [torch.nn.functional.cross_entropy(logits_cv.float(), wanted[part], reduction="none") for part, logits_cv in found]
    return torch.cat(parts).double().cpu().numpy()


def chart(curves: Mapping[str, Curve]) -> str:
    """Loss over position, a line a model."""
    length = next(iter(curves.values())).ends[-1]
    ticks = [(length * eighth / 8, f"{length * eighth // 8:,}") for eighth in range(1, 9)]
    return lines({name: curve.points() for name, curve in curves.items()}, Axes("tokens before", "nats per token", ticks))


def _measured(cfg: Config, model: ModelEntry, texts: Sequence[NDArray[np.int64]]) -> Curve:
    from megatron_prism.evals.progress import progress
    from megatron_prism.generate.transformers_backend import TransformersGenerator

    settings = BackendConfig.model_validate({"device": cfg.device, "dtype": cfg.dtype})
    with hf_folder(model.path) as folder, progress() as watch:
        network = TransformersGenerator.open(folder, settings).model
        return measure(network, texts, cfg.buckets, watch(f"{model.name}: loss by position", len(texts), 0))
