"""Finding, refusing and pruning training checkpoints; the exactness of their content is a law (tests/laws/test_resume.py)."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.engine import checkpoint, device, parallel, run_folder
from megatron_prism.errors import UserError

FINGERPRINT = {
    "seed": 1,
    "seq_len": 32,
    "mask_end_of_document": False,
    "sources": [{"name": "code", "weight": 3.0, "digest": "a"}, {"name": "math", "weight": 1.0, "digest": "b"}],
}


class Nothing(Block):
    """A config without keys."""


def write_step(run: Path, step: int, complete: bool = True, schema: int = 1) -> Path:
    folder = run_folder.step_folder(run, step)
    artifact.begin(folder, "checkpoint", Nothing())
    (folder / checkpoint.STATE).write_text(json.dumps({"schema_version": schema, "progress": {"step": step}, "layout": {}}))
    if complete:
        artifact.complete(folder)
    return folder


def test_a_half_written_checkpoint_is_never_chosen_and_is_refused_by_name(tmp_path):
    whole, half = write_step(tmp_path, 3), write_step(tmp_path, 6, complete=False)
    assert run_folder.newest(tmp_path) == whole == run_folder.resolve(tmp_path)
    with pytest.raises(UserError, match=r"step_00000006 has no COMPLETE"):
        run_folder.resolve(half)


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path):
    write_step(tmp_path, 3, complete=False)
    with pytest.raises(UserError, match="without a complete checkpoint"):
        run_folder.resolve(tmp_path)


def test_a_checkpoint_whose_file_was_cut_short_is_refused_by_file(tmp_path):
    folder = write_step(tmp_path, 3)
    (folder / checkpoint.STATE).write_text("{}")
    with pytest.raises(UserError, match=r"state\.json has 2 bytes"):
        run_folder.resolve(folder)


def test_a_newer_state_and_a_converted_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="upgrade megatron-prism"):
        checkpoint.read_state(write_step(tmp_path, 1, schema=99))
    with pytest.raises(UserError, match=r"model\.load='weights'"):
        checkpoint.read_state(tmp_path)


def test_pruning_keeps_the_newest_and_the_chosen_multiples(tmp_path):
    device.setup("cpu")
    parallel.start(device.CPU)
    assert dist.get_rank() == 0
    for step in (2, 4, 6, 8, 10):
        write_step(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=4)
    assert [folder.name for folder in run_folder.complete_steps(tmp_path)] == ["step_00000004", "step_00000008", "step_00000010"]
    checkpoint.prune(tmp_path, keep_last=None, keep_every=None)
    assert len(run_folder.complete_steps(tmp_path)) == 3


def changed(**changes: object) -> dict:
    data = json.loads(json.dumps(FINGERPRINT))
    sources = changes.pop("sources", None)
    data.update(changes)
    if sources is not None:
        data["sources"] = sources
    return data


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (changed(seed=2), "seed was 1, now 2"),
        (changed(seq_len=64), "seq_len was 32, now 64"),
        (changed(sources=[FINGERPRINT["sources"][0]]), "source math is gone"),
        (changed(sources=FINGERPRINT["sources"][::-1]), "the order of the sources was"),
        (changed(sources=[*FINGERPRINT["sources"], {"name": "prose", "weight": 1.0, "digest": "c"}]), "source prose is new"),
        (changed(sources=[{**FINGERPRINT["sources"][0], "weight": 2.0}, FINGERPRINT["sources"][1]]), "source code: weight was 3.0, now 2.0"),
        (changed(sources=[FINGERPRINT["sources"][0], {**FINGERPRINT["sources"][1], "digest": "x"}]), "source math: digest was 'b', now 'x'"),
    ],
)
def test_changed_data_is_refused_with_the_exact_difference(now, words):
    progress = checkpoint.Progress(step=5, data=FINGERPRINT)
    checkpoint.check_data(progress, FINGERPRINT)
    with pytest.raises(UserError, match=words):
        checkpoint.check_data(progress, now)


@pytest.mark.parametrize(("before", "after"), [(64, 128), (256, 256), (None, None)])
def test_a_longer_model_s_tokenizer_names_at_least_its_length(tmp_path, before, after):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": before}))
    checkpoint.put_config(tmp_path, {"max_position_embeddings": 128})
    assert json.loads((tmp_path / "config.json").read_text()) == {"max_position_embeddings": 128}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"model_max_length": after}
