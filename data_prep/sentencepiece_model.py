"""A raw sentencepiece .model as a Hugging Face tokenizer with the same ids.

transformers reads a .model as LLaMA's: BPE, nothing normalised. Where that gives sentencepiece's own ids (LLaMA, Mistral 7B) it is taken, so that
the ids are those of `LlamaTokenizer`. Other models (unigram, NFKC, user-defined symbols) are built here from what the .model says. Either way the
result is compared with sentencepiece on texts with every trap, and refused if it differs. Three differences are known and left: a control symbol's
text ("</s>") becomes that symbol; LlamaTokenizer adds no second space before a text that begins with one (transformers >= 5); and a unigram model may
cut a long run of one letter at other, equally likely places (sentencepiece adds scores in single precision).
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_prism.errors import UserError

UNIGRAM, BPE = 1, 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
PROBES = (
    "hello world",
    "two  spaces   and\ttabs\n\n\nlines\r\n",
    "trailing ",
    "",
    "émile ünïcode 中文字 日本語 العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🇩🇪 emoji",
    "a\x00b\x01c\x7f\x1b[0m",
    "def f(x):\n    return x ** 2  # c\n\tif x:\n        pass\n",
    "ﬁ ligature ½ \uff21 full",
    "e\u0301 combining \u200b zero \ufeff mark \u00a0 space \u2028 line",
    "12345 6.78e-9 0x1F",
    "\\frac{a}{b} = \\sqrt{2}",
)
SPACE_FIRST_PROBES = ("  two", " one", "   ", "\n\n", "▁ real ▁▁ mark")


def load(path: Path) -> Any:
    """A transformers tokenizer (fast) with the ids of a .model. Errors: UserError when the file is none, or no tokenizer gives its ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no sentencepiece model ({error}); give a .model file or a Hugging Face tokenizer folder") from None
    specials, proto = _special_tokens(processor), read(path)
    probes = probe_texts(proto)
    llama = _as_llama(path, specials)
    if llama is not None and not differing(llama, processor, probes):
        return llama
    built = _build(path, proto, specials)
    if wrong := differing(built, processor, (*probes, *SPACE_FIRST_PROBES)):
        raise UserError(
            f"{path}: no Hugging Face tokenizer gives sentencepiece's ids for {wrong[0]!r}; convert the model yourself and give the folder"
        )
    return built


def differing(tokenizer: Any, processor: Any, texts: tuple[str, ...]) -> list[str]:
    """The texts that a Hugging Face tokenizer and sentencepiece encode differently."""
    return [text for text in texts if tokenizer(text, add_special_tokens=False)["input_ids"] != processor.encode(text)]


def _special_tokens(processor: Any) -> dict[str, str]:
    ids = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    return {name: processor.id_to_piece(number) for name, number in ids.items() if number >= 0}


def _as_llama(path: Path, specials: dict[str, str]) -> Any:
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "tokenizer.model")
        try:
            return LlamaTokenizer.from_pretrained(folder, **specials)
        except (ValueError, TypeError, KeyError, RuntimeError):  # not LLaMA's kind of model; `_build` reads it
            return None


def probe_texts(proto: Any) -> tuple[str, ...]:
    """Texts on which every difference shows but the known ones; with the model's own symbols at every place."""
    return (*PROBES, *(f"{piece.piece}a {piece.piece}b{piece.piece}\n" for piece in proto.pieces if piece.type == USER_DEFINED))


def read(path: Path) -> Any:
    """What a .model file says, as sentencepiece's ModelProto."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _build(path: Path, proto: Any, specials: dict[str, str]) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(_model(proto, path))
    _set_text_rules(tokenizer, proto)
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=True) for piece in proto.pieces if piece.type == CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials)


def _model(proto: Any, path: Path) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == UNIGRAM:
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != BPE:
        raise UserError(f"{path} is neither a BPE nor a unigram model; train one of these")
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    # sentencepiece joins the neighbours that make the piece of the best score; a lower rank goes first here.
    merges = sorted(
        (-score, rank, cut, piece[:cut], piece[cut:])
        for rank, (piece, score) in enumerate(pieces)
        if piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    return models.BPE(
        {piece: rank for rank, (piece, _) in enumerate(pieces)},
        [(left, right) for *_, left, right in merges],
        unk_token=pieces[trainer.unk_id][0],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
    )


def _set_text_rules(tokenizer: Any, proto: Any) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    rules = proto.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # User-defined symbols are cut out before anything is joined; longest first, as sentencepiece matches them.
    symbols = sorted((piece.piece for piece in proto.pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    if symbols:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(re.escape(symbol) for symbol in symbols)), "isolated")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else parts)
