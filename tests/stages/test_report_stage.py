"""`prism report`: bare paths into a file or a folder, a recipe as a stage of a pipeline, and what is not written over."""

import pytest
from prism_command import prism
from report_cases import make, pipeline, trained

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.errors import UserError
from megatron_prism.stages import report


def test_bare_paths_make_one_file(tmp_path):
    pipeline(tmp_path / "runs")
    done = prism("report", "runs", "--output", "page.html", "--title", "<b>ours</b>", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "&lt;b&gt;ours&lt;/b&gt;" in (tmp_path / "page.html").read_text()
    again = prism("report", "runs/rl", "runs/evaluate", "--output", "page.html", cwd=tmp_path)
    assert again.returncode == 0, "a report is written over a report"


def test_what_is_no_report_is_not_written_over(tmp_path):
    (tmp_path / "page.html").write_text("<!DOCTYPE html>my diary")
    with pytest.raises(UserError, match=r"page\.html exists and is no page of prism report; choose another --output"):
        report.write([pipeline(tmp_path / "runs")], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "<!DOCTYPE html>my diary"


def test_another_stages_folder_is_not_written_over(tmp_path):
    pipeline(tmp_path / "runs")
    with pytest.raises(UserError, match="base is an output of prism train, so an output of prism report cannot be written there"):
        report.write([tmp_path / "runs"], tmp_path / "runs" / "base")


def test_a_path_that_is_no_artifact_is_refused_before_anything_is_written(tmp_path):
    done = prism("report", "nowhere", "--output", "page.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere does not exist; name outputs of stages" in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_as_a_stage_it_is_an_artifact_made_from_what_it_was_given(tmp_path):
    pipeline(tmp_path / "runs")
    cfg = load_recipe(None, [f"runs=['{tmp_path}/runs']", f"output='{tmp_path}/runs/report'"], report.Config)
    assert report.run(cfg) == tmp_path / "runs" / "report"
    provenance = artifact.require(tmp_path / "runs" / "report", "report")
    assert [path.rpartition("/")[2] for path in provenance["parents"]] == ["base", "data", "evaluate", "midtrain", "rl"], "and not itself"
    before = (tmp_path / "runs" / "report" / "report.html").stat().st_mtime_ns
    report.run(cfg)
    assert (tmp_path / "runs" / "report" / "report.html").stat().st_mtime_ns == before, "nothing changed, nothing is drawn"


def test_a_run_that_goes_on_is_drawn_again_each_time(tmp_path):
    trained(tmp_path / "runs" / "base", finished=False, steps=400, reached=50)
    cfg = report.Config(runs=[tmp_path / "runs"], output=tmp_path / "report")
    report.run(cfg)
    first = artifact.digest(tmp_path / "report")
    assert report.run(cfg) and artifact.digest(tmp_path / "report") != first


def test_a_recipe_does_not_write_a_single_file(tmp_path):
    with pytest.raises(UserError, match=r"must be a folder here.*prism report RUN --output page\.html"):
        load_recipe(None, ["runs=['x']", "output='page.html'"], report.Config)


def test_the_dry_run_lists_what_would_be_drawn(tmp_path, capsys):
    pipeline(tmp_path / "runs")
    make(tmp_path / "runs" / "begun", "evaluate", finished=False)
    report.dry_run(report.Config(runs=[tmp_path / "runs"], output=tmp_path / "report"))
    assert "begun: evaluate, unfinished\n" in capsys.readouterr().out
    assert not (tmp_path / "report").exists()
