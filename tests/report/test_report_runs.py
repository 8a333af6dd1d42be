import json
import shutil

import pytest
from report_cases import make, pipeline, scored, trained

from megatron_prism import artifact
from megatron_prism.errors import UserError
from megatron_prism.report import data_section, runs
from megatron_prism.report.runs import gather


def by_name(every):
    return {one.name: one for one in every}


def test_a_pipelines_folder_gives_its_artifacts_parents_first(tmp_path):
    every = gather([pipeline(tmp_path)])
    places = {one.name: place for place, one in enumerate(every)}
    assert set(places) == {"data", "base", "midtrain", "rl", "evaluate"}
    assert all(places[link.artifact.name] < places[one.name] for one in every for link in one.parents)
    assert {one.state for one in every} == {"finished"}


def test_lineage_is_followed_from_the_last_artifact_alone(tmp_path):
    pipeline(tmp_path)
    assert set(by_name(gather([tmp_path / "rl"]))) == {"data", "base", "midtrain", "rl"}


def test_a_checkpoint_stands_for_its_run_and_says_its_step(tmp_path):
    found = by_name(gather([pipeline(tmp_path)]))
    assert [(link.artifact.name, link.step) for link in found["rl"].parents] == [("midtrain", 40)]
    assert by_name(gather([tmp_path / "base" / "checkpoints" / "step_00000040"])).keys() == {"base", "data"}


def test_a_moved_project_is_told_by_its_digests(tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(pipeline(tmp_path / "project"), moved)
    every = gather([moved])
    assert "missing" not in {one.state for one in every}
    assert all(not link.note for one in every for link in one.parents)


def test_the_tokenizer_that_data_was_prepared_with_is_one_of_its_parents(tmp_path):
    make(tmp_path / "words", "tokenizer")
    make(tmp_path / "data", "prep", tokenizer=str(tmp_path / "words"))
    make(tmp_path / "other", "prep", tokenizer="a name on the hub")
    found = by_name(gather([tmp_path / "data", tmp_path / "other"]))
    assert [link.artifact.name for link in found["data"].parents] == ["words"]
    assert found["other"].parents == []


def exported(run):
    """Its Hugging Face folder, which has no provenance of its own."""
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    return str(run / "hf")


def test_an_evaluation_of_a_runs_exported_model_comes_from_that_run(tmp_path):
    run = trained(tmp_path / "base")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    models = [{"name": "base", "path": exported(run)}, {"name": "foreign", "path": str(foreign)}, {"name": "hub", "path": "a name on the hub"}]
    scores = make(tmp_path / "scores", "evaluate", models=models)
    found = by_name(gather([scores]))
    assert set(found) == {"base", "scores"}, "the run is found from its evaluation alone"
    assert [(link.artifact.name, link.note) for link in found["scores"].parents] == [("base", "")]


def test_a_run_that_is_recorded_and_read_as_exported_is_one_parent(tmp_path):
    run = trained(tmp_path / "base")
    models = [{"name": "base", "path": str(run)}, {"name": "again", "path": exported(run)}]
    scores = make(tmp_path / "scores", "evaluate", [run], models=models)
    assert [link.artifact.name for link in by_name(gather([scores]))["scores"].parents] == ["base"]


def test_a_missing_parent_is_shown_as_missing(tmp_path):
    pipeline(tmp_path)
    shutil.rmtree(tmp_path / "data")
    found = by_name(gather([tmp_path]))
    assert found["data"].state == "missing"
    assert "not on this machine" in found["data"].problem


def test_a_parent_that_was_made_again_is_said_to_be_another(tmp_path):
    pipeline(tmp_path)
    shutil.rmtree(tmp_path / "base")
    trained(tmp_path / "base", [tmp_path / "data"])
    notes = {(one.name, link.note) for one in gather([tmp_path]) for link in one.parents if link.note}
    assert notes == {("midtrain", "made again since"), ("evaluate", "made again since")}


def test_a_removed_checkpoint_is_said_to_be_gone(tmp_path):
    pipeline(tmp_path)
    run = trained(tmp_path / "long", steps=80, finished=False)
    make(run / "checkpoints" / "step_00000010", "checkpoint")
    child = make(tmp_path / "child", "evaluate", [run / "checkpoints" / "step_00000010"])
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    link = by_name(gather([child]))["child"].parents[0]
    assert (link.artifact.name, link.step, link.artifact.state) == ("long", 10, "unfinished")


def test_a_damaged_checkpoint_that_was_set_aside_is_no_part_of_its_run(tmp_path):
    run = trained(tmp_path / "base", finished=False)
    folder = run / "checkpoints" / "step_00000040"
    child = scored(tmp_path / "child", [folder])
    folder.rename(folder.with_name("step_00000040.damaged-1"))
    make(folder, "checkpoint")
    artifact.complete(run)
    (link,) = by_name(gather([run, child]))["child"].parents
    assert (link.artifact.name, link.step, link.note) == ("base", 40, "made again since")


def test_plans_of_an_old_run_are_those_of_its_newest_checkpoint_not_of_a_damaged_one(tmp_path):
    run = make(tmp_path / "old", "train", files={"metrics.jsonl": ""}, finished=False, steps=40)
    for name, source in (("step_00000010", "sums"), ("step_00000020", "prose"), ("step_00000030.damaged-1", "torn")):
        state = {"progress": {"data": {"sources": [{"name": source}]}}}
        make(run / "checkpoints" / name, "checkpoint", files={"state.json": state})
    (found,) = gather([run])
    assert [record["sources"][0]["name"] for record in data_section.plans(found)] == ["prose"]


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    found = gather([trained(tmp_path / "base", finished=False, steps=200, reached=50)])
    assert [(one.state, runs.progress(one)) for one in found] == [("unfinished", (50, 200))]


@pytest.mark.parametrize("damage", ["provenance.json", "COMPLETE", "config.toml"])
def test_a_broken_file_makes_an_artifact_unreadable_and_nothing_fails(tmp_path, damage):
    pipeline(tmp_path)
    (tmp_path / "base" / damage).write_text("{ torn")
    found = by_name(gather([tmp_path]))
    assert found["base"].state == "unreadable"
    assert damage in found["base"].problem
    assert found["rl"].state == "finished"


def test_a_changed_file_makes_an_artifact_unreadable_by_name(tmp_path):
    pipeline(tmp_path)
    with (tmp_path / "base" / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    assert "metrics.jsonl" in by_name(gather([tmp_path]))["base"].problem


def test_the_line_that_is_being_written_is_left_out(tmp_path):
    run = trained(tmp_path / "base", finished=False, steps=200, reached=50)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "lo')
    assert runs.progress(gather([run])[0]) == (50, 200)


def test_a_name_that_two_artifacts_have_carries_their_folders(tmp_path):
    pipeline(tmp_path / "one")
    trained(tmp_path / "two" / "base")
    names = set(by_name(gather([tmp_path])))
    assert {"one/base", "two/base", "midtrain"} <= names


def test_parents_that_name_each_other_end_the_search(tmp_path):
    one, two = make(tmp_path / "one", "train", finished=False), make(tmp_path / "two", "train", finished=False)
    for folder, other in ((one, two), (two, one)):
        provenance = json.loads((folder / "provenance.json").read_text())
        (folder / "provenance.json").write_text(json.dumps({**provenance, "parents": {str(other): "0"}}))
    assert len(gather([tmp_path])) == 2


@pytest.mark.parametrize(("name", "said"), [("nothing", "does not exist"), ("file", "is a file"), ("empty", "holds no artifact")])
def test_a_path_without_artifacts_is_refused_with_what_to_name(tmp_path, name, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{said}.*name"):
        gather([tmp_path / name])
