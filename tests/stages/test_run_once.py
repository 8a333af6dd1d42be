"""`stages.run_once`: what the examples' scripts run their stages with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.errors import UserError
from megatron_prism.stages import run_once


class Copy(Block):
    """A stage's recipe: letters to put down, after an input where there is one."""

    output: Path
    letters: str = "a"
    after: Path | None = None


class Copier(SimpleNamespace):
    """A stage that counts its runs."""

    Config = Copy
    runs = 0

    def parents(self, cfg: Copy) -> list[Path]:
        return [cfg.after] if cfg.after is not None else []

    def dry_run(self, cfg: Copy) -> None:
        print(cfg.letters)

    def run(self, cfg: Copy) -> Path:
        self.runs += 1
        artifact.begin(cfg.output, "copy", cfg, self.parents(cfg))
        (cfg.output / "letters").write_text(cfg.letters)
        artifact.complete(cfg.output)
        return cfg.output


def test_a_recipe_is_run_once(tmp_path: Path) -> None:
    stage, table = Copier(), {"output": tmp_path / "out"}
    found = [run_once(stage, table), run_once(stage, table), run_once(stage, Copy(output=tmp_path / "out"))]
    assert found == [tmp_path / "out"] * 3 and stage.runs == 1


def test_what_is_left_as_it_is_is_said_once_for_all_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, table = Copier(), {"output": tmp_path / "out"}
    run_once(stage, table)
    assert capsys.readouterr().out == ""
    run_once(stage, table)
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is finished and unchanged: nothing to do\n"
    monkeypatch.setenv("RANK", "1")
    run_once(stage, table)
    assert capsys.readouterr().out == ""


def test_every_stage_that_leaves_an_output_as_it_is_says_so() -> None:
    package = Path(artifact.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for folder in ("stages", "evals", "data_prep") for path in (package / folder).glob("*.py")}
    asking = {name for name, text in sources.items() if "artifact.is_current(" in text}
    assert asking == {name for name, text in sources.items() if "artifact.left_as_it_is(" in text} and len(asking) >= 12


def test_what_was_stopped_half_way_is_run_again(tmp_path: Path) -> None:
    stage, table = Copier(), {"output": tmp_path / "out"}
    (run_once(stage, table) / "COMPLETE").unlink()
    run_once(stage, table)
    assert stage.runs == 2


def test_another_recipe_or_another_input_is_no_reason_to_skip(tmp_path: Path) -> None:
    stage = Copier()
    first = run_once(stage, {"output": tmp_path / "first"})
    table: dict[str, Any] = {"output": tmp_path / "second", "after": first}
    assert run_once(stage, table) == run_once(stage, table) and stage.runs == 2, "an input that is as it was is no reason to run again"
    with pytest.raises(UserError, match="letters"):  # a finished folder is not written over: the stage says so
        run_once(stage, {**table, "letters": "b"})
    artifact_made_again(first)
    with pytest.raises(UserError, match="made again"):
        run_once(stage, table)


def test_a_table_is_checked_as_a_recipe_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lettres"):
        run_once(Copier(), {"output": tmp_path / "out", "lettres": "b"})


def artifact_made_again(folder: Path) -> None:
    """The same recipe with another result."""
    for file in ("COMPLETE", "letters"):
        (folder / file).unlink()
    cfg = Copy(output=folder)
    artifact.begin(folder, "copy", cfg)
    (folder / "letters").write_text("z")
    artifact.complete(folder)
