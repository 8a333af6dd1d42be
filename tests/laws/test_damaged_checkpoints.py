"""A damaged checkpoint is found on every rank before anything of it is used; a run that goes on from the one before it equals an unbroken run."""

import json
import shutil
from pathlib import Path

import pytest
from refusals import HALFWAY, KEPT, SAVED, halfway, train
from training import differing, final_state, metrics

from megatron_prism import artifact
from megatron_prism.engine import run_folder


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit, and nothing else."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("damaged")
    assert train(root, root / "whole", {"run": {}}) == {"run": ["", ""]}
    return root, root / "whole" / "run"


DAMAGES = {
    "a flipped bit of the weights": ("sharded/__1_0.distcp", flip),
    "a flipped bit of the metadata": ("sharded/.metadata", flip),
    "a flipped bit of a config": ("hf/config.json", flip),
    "a shard cut short": ("sharded/__0_1.distcp", cut),
    "a missing shard": ("sharded/__1_1.distcp", Path.unlink),
    "a flipped bit of the checksums": ("sharded/checksums.json", flip),
}


def test_every_damage_is_named_on_every_rank_and_the_run_goes_on_from_the_checkpoint_before_it(unbroken):
    root, run = unbroken
    folder = root / "damages"
    for name, (file, damage) in DAMAGES.items():
        damage(halfway(run, folder / name) / file)
    flip(halfway(run, folder / "previous") / "sharded/__1_0.distcp")
    for name in ("no read", "one read"):
        halfway(run, folder / name)
    reads = {name: {"fault": name, "checkpoint.on_corrupt": "previous"} for name in ("no read", "one read")}
    told = train(root, folder, {**{name: {} for name in DAMAGES}, "previous": {"checkpoint.on_corrupt": "previous"}, **reads})
    good = run_folder.step_folder(Path("checkpoints"), SAVED).name
    for name, (file, _) in DAMAGES.items():
        first, second = told[name]
        assert first == second, name
        assert f"step_{HALFWAY:08d}/{file}" in first, (name, first)
        assert f"{good} is whole: checkpoint.on_corrupt=previous goes on from it" in first, (name, first)
        assert run_folder.newest(folder / name) == run_folder.step_folder(folder / name, HALFWAY), "nothing was changed"
    assert "have checksum" in told["a flipped bit of the weights"][0] and "; expected " in told["a flipped bit of the weights"][0]
    assert " were written" in told["a shard cut short"][0] and "is missing" in told["a missing shard"][0]

    kinds = [json.loads((folder / f"no read.{rank}").read_text())["kind"] for rank in range(2)]
    assert kinds == ["MachineError"] * 2, "rank 1 alone could not read, for now"
    assert "could not be read" in told["no read"][0] and run_folder.newest(folder / "no read") == run_folder.step_folder(folder / "no read", HALFWAY)
    assert told["one read"] == ["", ""] and differing(final_state(folder / "one read"), final_state(run)) == []
    assert not list(folder.glob("* read/checkpoints/*.damaged-*"))

    went_on = folder / "previous"
    assert told["previous"] == ["", ""]
    assert [[line[key] for key in KEPT] for line in metrics(went_on)] == [[line[key] for key in KEPT] for line in metrics(run)]
    assert differing(final_state(went_on), final_state(run)) == []
    (record,) = json.loads((went_on / artifact.PROVENANCE).read_text())["damaged_checkpoints"]
    assert record["folder"] == f"step_{HALFWAY:08d}.damaged-1" and record["went_on_from"] == good and "__1_0.distcp" in record["found"][0]
    assert (went_on / "checkpoints" / record["folder"] / "sharded").is_dir()
    shutil.rmtree(went_on / "checkpoints" / record["folder"])
    artifact.require(went_on, "train")  # it is no part of the run
    assert [step.name for step in run_folder.complete_steps(went_on)] == [f"step_{step:08d}" for step in (2, 4, 6)]
