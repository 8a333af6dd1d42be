"""The ids are those that transformers gives, for any tokenizer, and nothing is put before a document."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from prep_cases import TRICKY, texts

from megatron_prism.data_prep import sentencepiece_model, tokenizer
from megatron_prism.data_prep.tokenizer import _prepare, _without_post_processor, load_auto, load_encoder
from megatron_prism.data_prep.tokenizer import prepare_tokenizer as prepare_in_its_own_process
from megatron_prism.errors import UserError

LONG_RUN = "a" * 5000
CORPUS = [*texts(60), *TRICKY, *sentencepiece_model.PROBES, *sentencepiece_model.SPACE_FIRST_PROBES, "<|end|> in text", LONG_RUN]


def prepare_tokenizer(source, target, end_of_document=None):
    """What `prepare_tokenizer` does, without the process of its own: each would import transformers again."""
    return _prepare(source, target, end_of_document)


def expected(folder):
    tokenizer = load_auto(folder)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in CORPUS]


def test_ids_equal_transformers_on_the_copy_and_on_the_original(tokenizer_folder, tmp_path):
    prepared = prepare_in_its_own_process(tokenizer_folder, tmp_path)
    ids = [list(row) for row in load_encoder(prepared)(CORPUS)]
    assert ids == expected(tokenizer_folder) == expected(tmp_path)
    assert max(len(row) for row in ids) > 1000  # the truncation in tokenizer.json is off
    assert (prepared.vocab_size, prepared.end_of_document) == (500, 0)


def test_nothing_is_added_even_where_the_tokenizer_puts_a_token_before_every_text(tokenizer_folder, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A <|end|>", special_tokens=[("<|pad|>", 1), ("<|end|>", 0)])
    tokenizer.save(str(source / "tokenizer.json"))
    prepared = prepare_tokenizer(source, tmp_path / "copy")
    plain = prepare_tokenizer(tokenizer_folder, tmp_path / "plain")
    ids, without = ([row.tolist() for row in load_encoder(each)(CORPUS)] for each in (prepared, plain))
    assert ids == without and prepared.hash == plain.hash


def test_a_post_processor_that_does_more_than_add_tokens_is_kept_and_others_are_left_out(tokenizer_folder):
    from tokenizers import Tokenizer
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    added = [("<|pad|>", 1)]
    backend.post_processor = Sequence([ByteLevel(trim_offsets=True), TemplateProcessing(single="<|pad|> $A", special_tokens=added)])
    assert _without_post_processor(backend).post_processor is None and backend.post_processor is not None
    backend.post_processor = TemplateProcessing(single="$A <|pad|> $A", special_tokens=added)
    assert _without_post_processor(backend) is backend


def test_texts_come_back_in_their_order_one_row_each_however_they_are_grouped(tokenizer_folder, tmp_path, monkeypatch):
    prepared = prepare_in_its_own_process(tokenizer_folder, tmp_path)
    alone = [row.tolist() for text in CORPUS for row in load_encoder(prepared)([text])]
    for characters in (1, 20, 1 << 30):
        monkeypatch.setattr(tokenizer, "GROUP_CHARACTERS", characters)
        assert [row.tolist() for row in load_encoder(prepared)(CORPUS)] == alone
    assert list(load_encoder(prepared)([])) == []


def test_the_hash_is_that_of_the_ids_not_of_the_files(tokenizer_folder, tmp_path):
    first = prepare_tokenizer(tokenizer_folder, tmp_path / "a")
    load_auto(tokenizer_folder).save_pretrained(tmp_path / "saved")
    again = prepare_tokenizer(tmp_path / "saved", tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() != (tmp_path / "b/tokenizer.json").read_bytes()
    assert again.hash == first.hash
    assert prepare_tokenizer(tokenizer_folder, tmp_path / "c", end_of_document="<|pad|>").hash != first.hash


def test_workers_need_neither_torch_nor_transformers(tokenizer_folder, tmp_path):
    backend = prepare_tokenizer(tokenizer_folder, tmp_path)
    (tmp_path / "t.json").write_text(json.dumps(backend._asdict()))
    code = (
        "import json, sys; from megatron_prism.data_prep import worker; from megatron_prism.data_prep import tokenizer as t;"
        f"print(list(t.load_encoder(t.Tokenizer(**json.load(open({str(tmp_path / 't.json')!r}))))(['a b'])));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_tokenizer_without_a_fast_backend_runs_through_transformers_without_torch(tmp_path):
    (tmp_path / "byt5").mkdir()
    (tmp_path / "byt5" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"}))
    prepared = prepare_tokenizer(tmp_path / "byt5", tmp_path / "copy")
    assert prepared.backend is None
    (tmp_path / "t.json").write_text(json.dumps(prepared._asdict()))
    code = (
        "import json, sys; from megatron_prism.data_prep import tokenizer as t;"
        f"rows = t.load_encoder(t.Tokenizer(**json.load(open({str(tmp_path / 't.json')!r}))))(['a b']);"
        "print(json.dumps([row.tolist() for row in rows]));"
        "assert sys.modules.get('torch') is None"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[ord("a") + 3, ord(" ") + 3, ord("b") + 3]]


SENTENCEPIECE = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "bpe_nfkc": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "user_defined_symbols": ["<think>", "</think>", "\n"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "nfkc_symbols": {"model_type": "bpe", "user_defined_symbols": ["<think>", "</think>"]},
}

AS_LLAMA = ("llama",)  # what transformers reads rightly


def train_sentencepiece(folder, name):
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts(200, 3) + CORPUS for line in text.splitlines() if line.strip())
    options = {"vocab_size": 600, "hard_vocab_limit": False, "allow_whitespace_only_pieces": True, "minloglevel": 2, **SENTENCEPIECE[name]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def sentencepiece_file(request, tmp_path_factory):
    return request.param, train_sentencepiece(tmp_path_factory.mktemp(request.param), request.param)


def test_a_sentencepiece_model_gives_sentencepieces_ids_and_saves_a_folder_with_the_same(sentencepiece_file, tmp_path):
    import sentencepiece

    name, path = sentencepiece_file
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    prepared = prepare_tokenizer(path, tmp_path / "tokenizer")
    corpus = [text for text in CORPUS if not (name in AS_LLAMA and text[:1] in (" ", "\u2581")) and not ("unigram" in name and text == LONG_RUN)]
    corpus += ["<think>x = 1\n</think> done\n"] if "symbols" in name else []
    ids = [list(row) for row in load_encoder(prepared)(corpus)]
    assert ids == [processor.encode(text) for text in corpus]
    saved = load_auto(tmp_path / "tokenizer")
    assert ids == [saved(text, add_special_tokens=False)["input_ids"] for text in corpus]
    assert prepared.end_of_document == processor.eos_id() == saved.eos_token_id
    assert prepared.vocab_size == processor.get_piece_size()


def test_a_llama_model_gives_the_ids_of_transformers_llama_tokenizer(tmp_path):
    from transformers import LlamaTokenizer

    path = train_sentencepiece(tmp_path / "model", "llama")
    prepared = prepare_tokenizer(path, tmp_path / "tokenizer")
    theirs = LlamaTokenizer.from_pretrained(path.parent)
    assert [list(row) for row in load_encoder(prepared)(CORPUS)] == [theirs(text, add_special_tokens=False)["input_ids"] for text in CORPUS]


def test_a_checkpoint_folder_is_taken_for_the_tokenizer_in_its_hf_folder(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "checkpoint" / "hf")
    direct = prepare_tokenizer(tokenizer_folder, tmp_path / "a")
    assert prepare_tokenizer(tmp_path / "checkpoint", tmp_path / "b").hash == direct.hash


def test_the_folder_that_transformers_would_read_wrongly_is_built_here(sentencepiece_file):
    """The reason for our own conversion: transformers reads these models with other ids."""
    import sentencepiece

    name, path = sentencepiece_file
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    llama = sentencepiece_model._as_llama(path, sentencepiece_model._special_tokens(processor))
    differs = llama is None or bool(sentencepiece_model.differing(llama, processor, sentencepiece_model.probe_texts(sentencepiece_model.read(path))))
    assert differs == (name not in AS_LLAMA)


@pytest.mark.parametrize(
    ("make", "words"),
    [("nothing", "does not exist"), ("empty", "holds no tokenizer files"), ("bad", "no tokenizer that"), ("noise", "no sentencepiece model")],
)
def test_what_is_no_tokenizer_is_refused(make, words, tmp_path):
    source = tmp_path / "source"
    if make in ("empty", "bad"):
        source.mkdir()
    if make == "bad":
        (source / "tokenizer.json").write_text("{}")
    if make == "noise":
        source = tmp_path / "x.model"
        source.write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(UserError, match=words):
        prepare_tokenizer(source, tmp_path / "copy")


def test_an_end_of_document_that_is_no_token_is_refused(tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match="is no token"):
        prepare_tokenizer(tokenizer_folder, tmp_path, end_of_document="<|nope|>")
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}))
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        prepare_tokenizer(source, tmp_path / "copy")
