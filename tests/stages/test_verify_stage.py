"""`prism verify`: every checkpoint of a run, one line each; a damaged one is named, and the status says so."""

import json

import pytest
import torch
from prism_command import prism

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.engine import run_folder
from megatron_prism.engine.sharded import Piece, write_streaming


class Nothing(Block):
    """A config of next to nothing."""

    key: int = 1


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        folder = run_folder.step_folder(tmp_path / "run", step)
        artifact.begin(folder, "checkpoint", Nothing())
        write_streaming(folder / "sharded", [Piece("table", [torch.arange(100.0)])], 1)
        artifact.complete(folder)
    return tmp_path / "run"


def test_each_checkpoint_of_a_run_is_looked_at_and_the_damaged_one_is_named(run):
    first, second = run_folder.complete_steps(run)
    found = prism("verify", str(run))
    assert found.returncode == 0 and f"whole    {first}" in found.stdout and f"whole    {second}" in found.stdout and "by checksum" in found.stdout
    file = first / "sharded" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)
    found = prism("verify", str(run))
    assert found.returncode == 2 and "1 damaged" in found.stderr and str(first) in found.stderr
    assert f"DAMAGED  {first}: {file} is not what was written" in found.stdout and f"whole    {second}" in found.stdout
    record = json.loads((second / artifact.COMPLETE).read_text())
    assert set(record["checksums"]["files"]) == {"config.toml", "provenance.json", "sharded/checksums.json"}
