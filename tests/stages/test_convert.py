"""`prism convert`: errors are instant and named, the dry run tells sizes, artifacts are whole or refused, --verify decides."""

import json
import shutil
import subprocess
import sys

import pytest
from prism_command import prism
from tiny_models import edit_config, write_llama

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.engine import weights
from megatron_prism.errors import UserError
from megatron_prism.stages import convert


def config(**values) -> convert.Config:
    return validate({key: str(value) if hasattr(value, "parts") else value for key, value in values.items()}, convert.Config, "test")


@pytest.fixture
def source(tmp_path):
    return write_llama(tmp_path / "hf")


def test_import_and_export_by_the_command_line(source, tmp_path):
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    done = prism("convert", "import", source, checkpoint, "--tp", 2, "--pp", 2, "--verify")
    assert done.returncode == 0, done.stderr
    assert "largest logits difference" in done.stdout and "MB/s" in done.stdout
    assert "Warning" not in done.stderr
    assert artifact.require(checkpoint, "checkpoint")["parents"] == {}
    done = prism("convert", "export", checkpoint, back)
    assert done.returncode == 0, done.stderr
    assert artifact.require(back, "hf")["parents"] == {str(checkpoint): artifact.digest(checkpoint)}
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_errors_and_the_dry_run_load_no_torch(source, tmp_path):
    script = "import sys; from megatron_prism import cli; sys.argv[1:] = {}\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    for words, said in [
        (["convert", "import", str(source), str(tmp_path / "out"), "--tp", "2", "--dry-run"], "parameters 39,392"),
        (["convert", "import", str(tmp_path / "nothing"), str(tmp_path / "out")], "does not exist"),
        (["convert", "import", str(source), str(tmp_path / "out"), "--dtype", "int4"], "int4"),
    ]:
        done = subprocess.run([sys.executable, "-c", script.format(words)], capture_output=True, text=True, timeout=60, check=False)
        assert said in done.stdout + done.stderr
        assert "False" in done.stdout and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": "nowhere"}, "nowhere does not exist"),
        ({"pp": 5}, "pp=5 must be at most the number of layers, 4"),
        ({"like": "nowhere"}, "like=nowhere does not exist"),
        ({"direction": "export"}, "COMPLETE"),
        ({"direction": "export", "tp": 2}, "for imports"),
    ],
)
def test_bad_requests_are_refused_by_name(source, tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        convert.run(config(**{"direction": "import", "source": source, "output": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_unknown_families_and_features_are_refused_before_anything_is_written(source, tmp_path):
    for changes, named in [({"model_type": "mamba9"}, "mamba9"), ({"model_type": "llama", "num_experts": 4}, "num_experts")]:
        edit_config(source, **changes)
        with pytest.raises(UserError, match=named):
            convert.run(config(direction="import", source=source, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_output_must_not_be_the_source(source):
    with pytest.raises(UserError, match="choose another output"):
        convert.run(config(direction="import", source=source, output=source))


def test_a_failed_check_leaves_no_complete_artifact(source, tmp_path, monkeypatch):
    original = weights.write_hf

    def spoiled(*args, **kwargs):
        folder = original(*args, **kwargs)
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-400] + b"\x3f" * 400)
        return folder

    convert.run(config(direction="import", source=source, output=tmp_path / "checkpoint"))
    monkeypatch.setattr(weights, "write_hf", spoiled)
    with pytest.raises(UserError, match="not the same model"):
        convert.run(config(direction="export", source=tmp_path / "checkpoint", output=tmp_path / "back", verify=True))
    assert not artifact.is_complete(tmp_path / "back")
    with pytest.raises(UserError, match="COMPLETE"):
        convert.run(config(direction="import", source=tmp_path / "back", output=tmp_path / "again"))


def test_a_damaged_source_leaves_no_complete_artifact(source, tmp_path):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        convert.run(config(direction="import", source=source, output=tmp_path / "out"))
    assert not artifact.is_complete(tmp_path / "out")
    shutil.rmtree(source)
    source = write_llama(source)
    convert.run(config(direction="import", source=source, output=tmp_path / "out"))  # the same output, taken up again
    assert artifact.is_complete(tmp_path / "out")


def test_a_checkpoint_is_not_imported_and_an_exported_model_is_a_parent(source, tmp_path):
    convert.run(config(direction="import", source=source, output=tmp_path / "a"))
    with pytest.raises(UserError, match="is a checkpoint already"):
        convert.run(config(direction="import", source=tmp_path / "a", output=tmp_path / "b"))
    convert.run(config(direction="export", source=tmp_path / "a", output=tmp_path / "c"))
    convert.run(config(direction="import", source=tmp_path / "c", output=tmp_path / "d"))
    assert list(artifact.require(tmp_path / "d")["parents"]) == [str(tmp_path / "c")]


def test_a_megatron_lm_checkpoint_needs_like(source, tmp_path):
    convert.run(config(direction="import", source=source, output=tmp_path / "a"))
    foreign = tmp_path / "a" / "sharded"
    with pytest.raises(UserError, match="--like"):
        convert.run(config(direction="import", source=foreign, output=tmp_path / "b"))
    convert.run(config(direction="import", source=foreign, output=tmp_path / "b", like=source, verify=True))
    assert json.loads((tmp_path / "b" / "hf" / "weights.json").read_text())["dtype"] == "float32"
