"""Perplexity by domain on held-out tokens: the mean negative log-likelihood per token, as training counts it.

A split's documents, each ended by its end-of-document id, form one stream, cut into windows of seq_len + 1 tokens that share one token with their
neighbour: each window predicts seq_len tokens from those before them in it. Where a split is longer than asked for, windows are taken evenly over it.
Bits per byte divides the same sum, in bits, by the UTF-8 bytes of the predicted text: the one figure to compare over tokenizers.

Owns: choosing windows, summing, adding sources up to domains. Refuses: a model whose vocabulary is smaller than the tokens (another tokenizer).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_prism.data_prep.blend import Blend
from megatron_prism.data_prep.manifest import Manifest, load_manifest
from megatron_prism.errors import UserError
from megatron_prism.evals.tokens import TokenStream
from megatron_prism.generate.interface import Progress


@dataclass(frozen=True)
class Likelihood:
    """nll: summed over `tokens` predicted tokens, in nats. bytes: UTF-8 bytes of their text."""

    nll: float
    tokens: int
    bytes: int

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """nats per token"""
        return self.nll / self.tokens

    def figures(self) -> dict[str, Any]:
        """For scores.json: loss (nats per token), perplexity, bits_per_byte, and the sums they come from."""
        bits = self.nll / math.log(2) / self.bytes if self.bytes else None
        return {"loss": self.loss, "perplexity": math.exp(self.loss), "bits_per_byte": bits, **asdict(self)}


@dataclass(frozen=True)
class HeldOut:
    """One source's validation tokens: windows [window, seq_len + 1], each row a window (the last one of a short split may be alone and shorter)."""

    source: str
    domain: str
    windows: list[NDArray[np.int64]]
    end_of_document: int
    vocab_size: int

    @cached_property
    def digest(self) -> str:
        """Of the windows: their tokens and where they are cut."""
        hasher = xxhash.xxh64()
        for window in self.windows:
            hasher.update(len(window).to_bytes(8, "big") + window.tobytes())
        return hasher.hexdigest()


def held_out(blend: Blend, seq_len: int, max_tokens: int | None) -> list[HeldOut]:
    """The validation windows of each source that has a validation split. max_tokens: predicted tokens per source at most (None: all)."""
    found = []
    for source in blend.sources:
        if source.validation is None:
            continue
        manifest = load_manifest(source.validation)
        windows = list(_windows(manifest, seq_len, max_tokens))
        if windows:
            found.append(HeldOut(source.name, source.domain, windows, manifest.end_of_document, manifest.vocab_size))
    if not found:
        raise UserError("the blend holds no validation tokens: prepare the data with a validation share, or leave the perplexity block out")
    return found


def window_starts(num_tokens: int, seq_len: int, max_tokens: int | None) -> list[int]:
    """First tokens of the chosen windows: all of them, or max_tokens // seq_len spread evenly. A short rest at the end is a window too."""
    starts = list(range(0, num_tokens - 1, seq_len))
    wanted = len(starts) if max_tokens is None else max(1, max_tokens // seq_len)
    if wanted >= len(starts):
        return starts
    return [starts[place] for place in np.linspace(0, len(starts) - 1, wanted).round().astype(int)]


def measure(model: Any, tokenizer: Any, part: HeldOut, batch_size: int, progress: Progress | None = None) -> Likelihood:
    """A transformers model on one source's windows. progress: called with the number of windows done.

    Errors: UserError where the model's vocabulary cannot hold the tokens.
    """
    if model.config.vocab_size < part.vocab_size:
        raise UserError(
            f"source {part.source} was prepared with {part.vocab_size} token ids, the model has {model.config.vocab_size}: "
            "prepare the data with its tokenizer"
        )
    total = Likelihood(0.0, 0, 0)
    for batch in _batches(part.windows, batch_size):
        nll = _window_nll(model, np.stack(batch))
        text_bytes = sum(predicted_bytes(tokenizer, window, part.end_of_document) for window in batch)
        total += Likelihood(nll, sum(len(window) - 1 for window in batch), text_bytes)
        if progress is not None:
            progress(len(batch))
    return total


def by_domain(parts: Iterable[tuple[str, Likelihood]]) -> dict[str, Likelihood]:
    """Add up (domain, likelihood) pairs, domains in order of first appearance."""
    domains: dict[str, Likelihood] = {}
    for domain, likelihood in parts:
        domains[domain] = domains.get(domain, Likelihood(0.0, 0, 0)) + likelihood
    return domains


def predicted_bytes(tokenizer: Any, window: NDArray[np.int64], end_of_document: int) -> int:
    """UTF-8 bytes of the text that a window predicts: of all its tokens, less that of the first; ends of documents have none."""
    tokens = [int(token) for token in window]
    first = [token for token in tokens[:1] if token != end_of_document]
    kept = [token for token in tokens if token != end_of_document]
    return len(tokenizer.decode(kept).encode()) - len(tokenizer.decode(first).encode())


def _window_nll(model: Any, window_bs: NDArray[np.int64]) -> float:
    import torch

    tokens = torch.from_numpy(window_bs).to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").double().sum())


def _windows(manifest: Manifest, seq_len: int, max_tokens: int | None) -> Iterator[NDArray[np.int64]]:
    stream = TokenStream(manifest)
    for start in window_starts(len(stream), seq_len, max_tokens):
        yield stream.read(start, min(seq_len + 1, len(stream) - start))


def _batches(windows: Sequence[NDArray[np.int64]], size: int) -> Iterator[list[NDArray[np.int64]]]:
    """Batches of equally long windows, in order."""
    batch: list[NDArray[np.int64]] = []
    for window in windows:
        if batch and (len(batch) == size or len(window) != len(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
