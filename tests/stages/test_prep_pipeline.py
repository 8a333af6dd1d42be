"""`prism run` gives data preparation the machine: all cores in one process as `prism prep` does, or several processes where the stage names ranks."""

import json
import os
from pathlib import Path

import pytest
from prism_command import prism

PIPELINE = """
[[stage]]
name = "prep"
recipe = "prep.toml"
"""
MAKE = """
import multiprocessing

def documents(count, seen):
    for number in range(count):
        yield f"document {number} of a chunk of its own " * 30_000
    open(seen, "w").write(str(len(multiprocessing.active_children())))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}))
    (tmp_path / "pipeline.toml").write_text(PIPELINE)
    return tmp_path


def test_a_prep_stage_takes_every_core_unless_told_otherwise(project: Path) -> None:
    (project / "make.py").write_text(MAKE)
    cores = len(os.sched_getaffinity(0))
    source = f'[[source]]\nname = "s"\nfunction = "make.py:documents"\narguments = {{count = {2 * cores + 1}, seen = "seen"}}\n'
    (project / "prep.toml").write_text(f'output = "out"\ntokenizer = "tok"\n{source}')
    done = prism("run", "pipeline.toml", cwd=project, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int((project / "seen").read_text()) == cores
    assert done.stdout.count("tokens/s") == 1


def test_a_prep_stage_on_ranks_is_several_processes_with_the_bytes_of_one(project: Path) -> None:
    for number in range(4):
        (project / f"{number}.jsonl").write_text("".join(json.dumps({"text": f"{number} {line} " * 20}) + "\n" for line in range(20)))
    (project / "prep.toml").write_text('tokenizer = "tok"\nshard_bytes = 3000\nworkers = 1\n[[source]]\nname = "s"\npaths = ["*.jsonl"]\n')
    (project / "pipeline.toml").write_text(PIPELINE + 'ranks = 2\nset.output = "shared"\n')
    shared = prism("run", "pipeline.toml", cwd=project, timeout=280)
    assert shared.returncode == 0 and "on 2 ranks" in shared.stdout, shared.stdout + shared.stderr
    assert "process 0 of 2" in shared.stdout and "process 1 of 2" in shared.stdout
    alone = prism("prep", "prep.toml", "output=alone", cwd=project, timeout=120)
    assert alone.returncode == 0, alone.stderr
    names = sorted(path.name for path in (project / "alone/s/train").iterdir())
    assert len([name for name in names if name.endswith(".bin")]) == 4
    for name in names:
        assert (project / "alone/s/train" / name).read_bytes() == (project / "shared/s/train" / name).read_bytes()
