"""Tokenizer: text -> a sentencepiece model and the Hugging Face tokenizer with the same ids, for models that are trained from nothing.

    OUTPUT/tokenizer.model     as sentencepiece wrote it
    OUTPUT/tokenizer.json ...  what AutoTokenizer loads, checked against the model by data_prep
Every character survives (unknown ones as their UTF-8 bytes), spaces are kept as they are, digits stand alone, "</s>" ends a document and nothing is
put before one. The same text and recipe give the same tokenizer.
"""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_prism import artifact
from megatron_prism.config import Block, Positive
from megatron_prism.data_prep import inputs
from megatron_prism.data_prep.documents import read_chunk
from megatron_prism.data_prep.settings import SourceConfig
from megatron_prism.data_prep.sources.selection import Selector
from megatron_prism.errors import UserError

SPECIAL_AND_BYTES = 2 + 256
"""Tokens that every vocabulary here holds: <unk>, </s>, and one for each byte."""


class Config(Block):
    """Text -> a tokenizer."""

    output: Path
    """folder to write"""
    vocab_size: Annotated[int, Field(gt=SPECIAL_AND_BYTES)]
    """tokens in all, of which 258 are <unk>, </s> and the bytes"""
    source: Annotated[list[SourceConfig], Field(min_length=1)]
    """[[source]] tables as in a prep recipe; weight is the share of the training text (none for every source: equal shares)"""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """kind of sentencepiece model: byte-pair merges, or a unigram language model"""
    max_bytes: Positive = 8 << 20
    """text to train on, over all sources; each is read from its start"""


def parents(cfg: Config) -> list[Path]:
    """None: text is no artifact."""
    return []


def dry_run(cfg: Config) -> None:
    """Print the shares of the text."""
    for source, share in zip(cfg.source, _shares(cfg), strict=True):
        print(f"source {source.name}: up to {share} bytes of text")
    print(f"{cfg.model_type} tokenizer of {cfg.vocab_size} tokens -> {cfg.output}")


def run(cfg: Config) -> Path:
    """Train it; returns the finished folder."""
    if artifact.is_current(cfg.output, cfg):
        return artifact.left_as_it_is(cfg.output)
    texts = [list(_sample(source, share)) for source, share in zip(cfg.source, _shares(cfg), strict=True)]
    model = _train(cfg, itertools.chain.from_iterable(texts))
    artifact.begin(cfg.output, "tokenizer", cfg)
    artifact.write_atomic(cfg.output / "tokenizer.model", model)
    from megatron_prism.data_prep import sentencepiece_model

    tokenizer = sentencepiece_model.load(cfg.output / "tokenizer.model")
    tokenizer.save_pretrained(cfg.output)
    artifact.complete(cfg.output)
    _report(cfg, tokenizer, texts)
    return cfg.output


def _shares(cfg: Config) -> list[int]:
    weights = [source.weight or 1.0 for source in cfg.source]
    return [max(1, int(cfg.max_bytes * weight / sum(weights))) for weight in weights]


def _sample(source: SourceConfig, max_bytes: int) -> Iterator[str]:
    """Documents from the start of a source until they hold max_bytes."""
    found, size = inputs.find_inputs(source), 0
    selector = Selector(source, found, 0)
    for chunk in inputs.chunks(source, found):
        for text in read_chunk(chunk.kind, chunk.payload, selector.extract_for(chunk)).texts:
            yield text
            size += len(text.encode())
            if size >= max_bytes:
                return


def _train(cfg: Config, texts: Iterator[str]) -> bytes:
    import sentencepiece

    lines = (line for text in texts for line in text.split("\n") if line)  # sentencepiece would do the same: its sentences are lines
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=cfg.vocab_size,
            model_type=cfg.model_type,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 16,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot train vocab_size={cfg.vocab_size} on this text ({error}); try a smaller vocab_size or more text"
        ) from None
    return model.getvalue()


def _report(cfg: Config, tokenizer: Any, texts: list[list[str]]) -> None:
    for source, documents in zip(cfg.source, texts, strict=True):
        sample = documents[:200]
        size, tokens = sum(len(text.encode()) for text in sample), sum(len(ids) for ids in tokenizer(sample)["input_ids"])
        print(f"{source.name}: {size / max(1, tokens):.2f} bytes per token over {len(sample)} of {len(documents)} documents")
