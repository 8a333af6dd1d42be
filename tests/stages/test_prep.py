"""`prism prep` at the command line: quick to refuse, honest in a dry run, done once."""

import gzip
import json
import sys

import pytest
from prism_command import prism

from megatron_prism import artifact
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.manifest import load_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("prep")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False))
    (folder / "tok").mkdir()
    tokenizer.save(str(folder / "tok" / "tokenizer.json"))
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    (folder / "maths.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps({"q": f"{n}+1?", "a": str(n + 1)}).encode() + b"\n" for n in range(40)))
    )
    (folder / "prose.txt").write_text("one\n\ntwo\nlines\n\nthree")
    (folder / "prep.toml").write_text(
        'output = "out"\ntokenizer = "tok"\nworkers = 1\n'
        '[[source]]\nname = "maths"\ndomain = "math"\nweight = 3\npaths = ["*.jsonl.gz"]\nformat = "{q}\\n{a}"\n'
        '[[source]]\nname = "prose"\nweight = 1\npaths = ["prose.txt"]\ndocuments = "paragraph"\n'
    )
    return folder


def test_a_dry_run_lists_inputs_and_writes_nothing(folder):
    done = prism("prep", "prep.toml", "output=dry", "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "maths" in done.stdout and "maths.jsonl.gz" in done.stdout
    assert not (folder / "dry").exists()


def test_a_run_makes_a_finished_artifact_prints_a_table_and_is_done_once(folder):
    done = prism("prep", "prep.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "maths" in done.stdout and "75.00" in done.stdout and "43 documents" in done.stdout and "tokens/s" in done.stdout
    assert artifact.require(folder / "out", "prep")["kind"] == "prep"
    blend = load_blend(folder / "out")
    assert [(source.name, source.domain, source.weight, source.validation) for source in blend.sources] == [
        ("maths", "math", 3, None),
        ("prose", "general", 1, None),
    ]
    assert load_manifest(blend.sources[0].train).document_lengths()[:2].tolist() == [len("0+1?\n1") + 1, len("1+1?\n2") + 1]
    assert load_manifest(blend.sources[1].train).num_documents == 3

    again = prism("prep", "prep.toml", "workers=2", cwd=folder)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = prism("prep", "prep.toml", "seed=7", cwd=folder)
    assert other.returncode == 2 and "seed was 1234, now 7" in other.stderr
    (folder / "prose.txt").write_text("changed")
    changed = prism("prep", "prep.toml", cwd=folder)
    assert changed.returncode == 2 and "prose.txt changed" in changed.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("source.0.name=../x", "becomes a folder"),
        ("source.0.function=a:b", "either paths or function"),
        ("source.0.format=plain", "names no {column}"),
        ("source.1.name=maths", "must differ"),
        ("source.1.weight=none", "or none of them"),
        ("validation_fraction=1", "less than 1"),
        ("tokeniser=x", "did you mean tokenizer"),
        ('source.0.paths=["nope/*.jsonl"]', "matches no file"),
    ],
)
def test_mistakes_are_one_message_and_status_2(folder, override, words):
    done = prism("prep", "prep.toml", "output=bad", override, "--dry-run", cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_the_stage_imports_neither_torch_nor_tokenizers(folder):
    import subprocess

    code = "import sys, megatron_prism.stages.prep; assert not {'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
