"""The tokenizer of a prep run: any Hugging Face folder, or a sentencepiece .model, copied into the output and loaded by every worker.

The ids are those of `AutoTokenizer(...)(text, add_special_tokens=False)`, by construction: the workers run the very backend that transformers builds
(it does not always follow tokenizer.json to the letter), without importing transformers or torch. Nothing is put before a document; the
end-of-document id after it is the caller's to add.

Owns: loading, copying, identifying. Refuses: folders without a tokenizer, tokenizers without an end-of-sequence token, code that would need trust.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep import backends, sentencepiece_model
from megatron_prism.errors import UserError

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
GROUP_CHARACTERS = 1 << 16
"""Texts that Hugging Face's tokenizers get at once: what it makes of them, about a hundred bytes a token, then stays in the processor's caches."""
Ids = NDArray[np.uint32]
Encode = Callable[[list[str]], Iterable[Ids]]
Offsets = NDArray[np.int64]


class Tokenizer(NamedTuple):
    """What a worker needs. backend: the `tokenizers` serialisation, or None where only transformers can run it, from `folder`.

    hash: of what decides ids: vocabulary, end-of-document id and the ids of probe texts; the same for one tokenizer saved in two ways.
    end_text: the end-of-document token as texts hold it.
    faster: encode with `backends`, which was seen to give the same ids.
    chat_template: jinja, where it has one; special_tokens: by role (bos_token, ...), as templates name them.
    """

    folder: str
    backend: str | None
    hash: str
    vocab_size: int
    end_of_document: int
    chat_template: str | None = None
    special_tokens: dict[str, Any] | None = None
    faster: bool = False
    end_text: str | None = None


def prepare_tokenizer(source: Path, target: Path, end_of_document: str | None = None) -> Tokenizer:
    """Copy a tokenizer into the empty folder `target` so that AutoTokenizer loads it there, and describe it.

    source: an HF folder (a checkpoint folder's `hf` is found), or a .model file. end_of_document: a token instead of the end-of-sequence token.
    Works in a process of its own, so that transformers never weighs on the caller.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), hide_torch) as pool:
        return pool.submit(_prepare, source, target, end_of_document).result()


def on_backend(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer as the workers are to run it. name: "hf", or a faster one, which is compared first. Errors: UserError where its ids differ."""
    if name == "hf":
        return tokenizer
    if tokenizer.backend is None:
        raise UserError(f"tokenizer_backend={name} reads what the tokenizers package runs, and this tokenizer is Python code; leave the key at hf")
    backends.check(tokenizer.backend)
    return tokenizer._replace(faster=True)


def hide_torch() -> None:
    """Make `import torch` fail in this process: transformers then imports in half the time, with its tokenizers and without models."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.modules["torch"] = None  # type: ignore[assignment]


def _prepare(source: Path, target: Path, end_of_document: str | None) -> Tokenizer:
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file() and source.suffix == ".model":
        sentencepiece_model.load(source).save_pretrained(target)
    else:
        _copy_files(_tokenizer_folder(source), target)
    loaded = load_auto(target)
    backend = getattr(loaded, "backend_tokenizer", None)
    end, end_text = _end_of_document(loaded, source, end_of_document)
    ids = [loaded(text, add_special_tokens=False)["input_ids"] for text in (*sentencepiece_model.PROBES, *sentencepiece_model.SPACE_FIRST_PROBES)]
    vocabulary = loaded.get_vocab()
    content = json.dumps([sorted(vocabulary.items()), end, ids])
    return Tokenizer(
        folder=str(target),
        backend=None if backend is None else backend.to_str(),
        hash=hashlib.sha256(content.encode()).hexdigest(),
        vocab_size=max(max(vocabulary.values(), default=0) + 1, len(loaded)),
        end_of_document=end,
        chat_template=loaded.get_chat_template() if loaded.chat_template else None,
        special_tokens=dict(loaded.special_tokens_map),
        end_text=end_text,
    )


def load_auto(folder: Path) -> Any:
    """AutoTokenizer of a local folder. Errors: UserError when transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to pydantic's and Rust's own
        raise UserError(f"{folder} has no tokenizer that transformers loads ({type(error).__name__}: {str(error)[:300]})") from None


def _tokenizer_folder(source: Path) -> Path:
    if not source.exists():
        raise UserError(f"tokenizer={source} does not exist; give a Hugging Face folder, a checkpoint folder, or a sentencepiece .model file")
    for folder in (source, source / "hf"):
        if folder.is_dir() and any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
            return folder
    raise UserError(f"tokenizer={source} holds no tokenizer files; give a Hugging Face folder, a checkpoint folder, or a sentencepiece .model file")


def _copy_files(source: Path, target: Path) -> None:
    for pattern in (*TOKENIZER_FILES, "config.json"):  # config.json names the class where tokenizer_config.json does not
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _end_of_document(loaded: Any, source: Path, token: str | None) -> tuple[int, str]:
    token = token if token is not None else loaded.eos_token
    if token is None:
        raise UserError(f"tokenizer={source} has no end-of-sequence token; set end_of_document to one of its tokens")
    vocabulary = loaded.get_vocab()
    if token not in vocabulary:
        raise UserError(f"end_of_document={token!r} is no token of {source}; choose one of its tokens, such as {loaded.eos_token!r}")
    return int(vocabulary[token]), str(token)


def limit_threads() -> None:
    """One thread for each worker: called in a worker before `tokenizers` is imported."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")


def load_encoder(tokenizer: Tokenizer) -> Encode:
    """A function from texts to their ids, nothing added. Called in each worker; imports transformers only for a tokenizer without a backend."""
    if tokenizer.faster and tokenizer.backend is not None:
        return backends.load(tokenizer.backend)
    if tokenizer.backend is None:
        hide_torch()
        slow = load_auto(Path(tokenizer.folder))
        return lambda texts: (_ids(slow(text, add_special_tokens=False)["input_ids"]) for text in texts)
    backend = _without_post_processor(_backend(tokenizer.backend))

    def encode(texts: list[str]) -> Iterator[Ids]:
        for group in _groups(texts):
            # encode_batch_fast gives encode_batch's ids without the character offsets that nobody reads here
            for encoding in backend.encode_batch_fast(group, add_special_tokens=False):
                yield _ids(encoding.ids)

    return encode


def _ids(found: list[int]) -> Ids:
    return np.asarray(array("I", found))  # in half of fromiter's time, and a third of asarray's


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, some at a time."""
    group, characters = [], 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _without_post_processor(backend: Any) -> Any:
    """The same tokenizer without the step that puts special tokens around a text, which costs a twentieth where none are asked for. One that does
    more than that stays: it would show in any text, for it sees no more of it than where it is."""
    if backend.post_processor is not None:
        plain = type(backend).from_str(backend.to_str())
        plain.post_processor = None
        probes = ["", *sentencepiece_model.PROBES, *sentencepiece_model.SPACE_FIRST_PROBES]
        found, expected = (each.encode_batch_fast(probes, add_special_tokens=False) for each in (plain, backend))
        if all(one.ids == other.ids for one, other in zip(found, expected, strict=True)):
            return plain
    return backend


@lru_cache(1)
def load_marking_encoder(serialised: str) -> Callable[[list[str]], tuple[list[Ids], list[Offsets]]]:
    """The ids of `load_encoder`, and the characters (begin, end) of each, int64 [tokens, 2]; for a tokenizer with this backend."""
    backend = _backend(json.dumps({**json.loads(serialised), "post_processor": None}))  # which would leave white space out of places

    def encode(texts: list[str]) -> tuple[list[Ids], list[Offsets]]:
        found = backend.encode_batch(texts, add_special_tokens=False)
        places = (np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)) for encoding in found)
        return [_ids(encoding.ids) for encoding in found], [place.reshape(-1, 2) for place in places]

    return encode


def _backend(serialised: str) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    return backend
