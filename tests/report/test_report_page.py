"""What stands on the page, section by section, and that a broken file takes no other section along."""

import json
import re

import pytest
from report_cases import make, pipeline, policy, scored, trained

from megatron_prism.errors import UserError
from megatron_prism.evals.reference import load_table
from megatron_prism.report import evaluation_section, page, paper, rl_section, training_section
from megatron_prism.report.runs import gather
from megatron_prism.report.training_section import Log

FETCHES = r"""(?:src|href|action|poster|data)\s*=\s*["']?[^"'#\s]|url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(|WebSocket|<link|<iframe"""


def drawn(*paths, model=None):
    return page.page(gather(paths), "a title", model)


def cells(text):
    """The table's rows as text."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)
    return [[re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_page_asks_for_nothing(tmp_path):
    text = drawn(pipeline(tmp_path))
    markup = re.sub(r"&lt;.*?&gt;", "", text)  # what a model wrote is text
    assert re.findall(FETCHES, markup) == []
    assert re.findall(FETCHES, markup + "<img src=x>") == ["src=x"], "the search finds what it is for"
    assert "default-src 'none'" in text
    assert re.findall(r"https?://", text) == []


def test_every_section_of_a_pipeline_is_there_in_its_order(tmp_path):
    assert re.findall(r'<h2 id="([a-z]+)"', drawn(pipeline(tmp_path))) == ["lineage", "data", "training", "rl", "evaluation", "provenance"]


def test_planned_and_consumed_shares_stand_beside_each_other(tmp_path):
    pipeline(tmp_path)
    rows = cells(drawn(tmp_path / "base"))
    assert [["sums"], ["75.00", "%"], ["75.00", "%"], ["15.4k"], ["3.75"]] in rows
    assert [["prose"], ["25.00", "%"], ["25.00", "%"], ["5.12k"], ["1.25"]] in rows


def test_a_run_that_was_stopped_says_where_it_went_on(tmp_path):
    folder = trained(tmp_path / "base", finished=False, steps=400, reached=50)
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["earlier_sessions"] = [{"started_at": "2023-11-14T22:13:00+00:00"}]
    (folder / "provenance.json").write_text(json.dumps({**provenance, "started_at": "2023-11-14T22:13:40+00:00"}))
    (one,) = gather([folder])
    assert [step for step, _ in training_section.resumes(Log(one, one.lines()))] == [19], "the line of step 20 was written at that very second"
    text = drawn(folder)
    assert "stopped after step 19, taken up again" in text and "resumed" in text
    assert "step 50 of 400" in text


def test_a_broken_log_is_said_and_takes_no_other_section_along(tmp_path):
    pipeline(tmp_path)
    going = trained(tmp_path / "going", finished=False, steps=400, reached=9)
    (going / "metrics.jsonl").write_text('{"step": 1, "loss": "much"}\n{"torn\n')
    text = drawn(tmp_path)
    assert "This section cannot be drawn" in text
    assert '<h2 id="evaluation">Evaluation</h2>' in text and '<h2 id="rl">' in text


def test_scores_of_an_unknown_form_are_said(tmp_path):
    folder = make(tmp_path / "scores", "evaluate", files={"scores.json": {"models": [1, 2]}})
    assert "This section cannot be drawn: a file is not what its stage writes" in drawn(folder)


def test_an_unreadable_artifact_is_named_and_not_drawn(tmp_path):
    pipeline(tmp_path)
    (tmp_path / "evaluate" / "scores.json").write_text("{}")
    text = drawn(tmp_path)
    assert re.search(r"evaluate cannot be read, and nothing of it is drawn: .*scores\.json has 2 bytes", text)
    assert 'id="evaluation"' not in text


@pytest.mark.parametrize(
    ("accuracy", "error", "low", "high"),
    [(0.0, 0.0, 0.0, 0.0370), (1.0, 0.0, 0.9630, 1.0), (0.5, 0.05, 0.4038, 0.5962)],
    ids=["none of 100", "all of 100", "50 of 100"],
)
def test_intervals_are_wilsons_and_not_empty_at_the_ends(accuracy, error, low, high):
    """Known values of Wilson's interval for 0, 100 and 50 of 100."""
    assert evaluation_section.interval(accuracy, error, 100) == pytest.approx((low, high), abs=1e-4)


def test_a_clustered_error_widens_the_interval():
    narrow, wide = (evaluation_section.interval(0.5, error, 100) for error in (0.05, 0.1))
    assert wide[0] < narrow[0] and wide[1] > narrow[1]


def test_the_papers_rows_stand_below_with_their_table_and_the_misprint_marked(tmp_path):
    text = drawn(scored(tmp_path / "scores", [], tasks=("math500", "aime24")), model="granite-3.3-8b")
    rows = {" ".join(row[0]): row for row in cells(text) if row and row[0]}
    assert rows["paper T19: MC"][1:3] == [["74.22"], ["32.44"]]
    assert rows["paper T19: MC"][-2] == ["44.33", "†"], "the misprint is printed, and marked"
    assert ["44.99"] in rows["paper T11: MC, no RL"]
    assert "mean of its own row is 45.00" in text
    assert load_table("T11").source in text


def test_ruler_is_drawn_by_length_with_the_papers_curves_beside(tmp_path):
    names = [f"{task}-{length}" for task in ("niah", "qa") for length in (8192, 16384, 131072)]
    folder = scored(tmp_path / "scores", [], tasks=names)
    results = json.loads((folder / "scores.json").read_text())
    for model in results["models"].values():
        for task in model["tasks"].values():
            task["domain"] = "long context"
    lengths = make(tmp_path / "lengths", "evaluate", files={"scores.json": results})
    text = drawn(lengths, model="granite-3.3-8b")
    figure = re.search(r"<h4>By length.*?</figure>", text, re.DOTALL)
    assert figure
    assert {"base", "midtrained", "paper T7: merge", "paper T7: base"} <= set(re.findall(r'data-name="([^"]+)"', figure[0]))
    assert [label in figure[0] for label in (">8,192<", ">16,384<", ">131,072<")] == [True] * 3
    assert "Mean of 2 tasks at each length" in text


def test_a_model_that_the_paper_has_not_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"paper='gpt-2' must be a model of the paper: granite-3\.3-8b, "):
        drawn(pipeline(tmp_path), model="gpt-2")


def test_the_papers_model_is_told_from_the_shape(tmp_path):
    from megatron_prism import families

    config = {**families.published("llama-3.1-8b"), "max_position_embeddings": 262_144}
    run = make(tmp_path / "hf", "hf", files={"config.json": config})
    assert paper.model_of(gather([run]), None) == "llama-3.1-8b"
    other = make(tmp_path / "other", "hf", files={"config.json": {**config, "num_hidden_layers": 31}})
    assert paper.model_of(gather([other]), None) is None


def test_rl_shows_each_domain_and_the_sum_of_what_was_solved_from_zero(tmp_path):
    (one,) = [one for one in gather([policy(tmp_path / "rl", [])]) if one.kind == "rl"]
    text = rl_section.section([one])
    reward = re.search(r"<h4>Reward</h4>.*?</figure>", text, re.DOTALL)
    assert reward and set(re.findall(r'data-name="([^"]+)"', reward[0])) == {"all", "math", "code"}
    solved = re.search(r"<h4>Solved from zero</h4>.*?</figure>", text, re.DOTALL)
    assert solved and re.search(r'data-y="0\.0,15\.75,', solved[0]), "1 + 2 + 3 + 4 + 5 prompts, and a margin"


def test_responses_are_the_best_and_the_worst_of_a_prompt(tmp_path):
    text = drawn(policy(tmp_path / "rl", []))
    assert "1 of 4 right" in text
    assert re.findall(r"response (\d):", text) == ["2", "3"]


def test_thirty_checkpoints_fit_on_a_page_of_bounded_size(tmp_path):
    names = [f"step_{step}" for step in range(30)]
    runs = [trained(tmp_path / f"run_{number}", steps=3000) for number in range(6)]
    text = drawn(scored(tmp_path / "scores", runs, names=names))
    assert len(text) < 3e6
    assert all(f">{name}<" in text for name in names)


def with_means(folder, means, **config):
    """An evaluation of models of these mean accuracies."""
    models = {name: {"tasks": {}} for name in means}
    averages = {name: {"plain": mean, "paper": None} for name, mean in means.items()}
    return make(folder, "evaluate", files={"scores.json": {"models": models, "averages": averages}}, tasks={"names": []}, **config)


def test_the_tile_tells_models_together_that_were_asked_alike(tmp_path):
    drawn_at_random, greedy = {"generation": {"temperature": 1.0}}, {"generation": {"temperature": 0.0}}
    folders = [with_means(tmp_path / "drawn", {"start": 0.066}, **drawn_at_random)]
    folders += [with_means(tmp_path / name, {name: mean}, **greedy) for name, mean in (("base_0", 0.194), ("mid_0", 0.361))]
    text = drawn(*folders)
    assert "<b>19.4 → 36.1\N{NO-BREAK SPACE}%</b><span>mean accuracy, base_0 → mid_0</span>" in text


def test_a_run_of_which_many_checkpoints_were_read_is_named_once_with_its_steps(tmp_path):
    run = trained(tmp_path / "run")
    steps = [run / "checkpoints" / f"step_{step:08d}" for step in (2000, 1000)]
    for folder in steps:
        make(folder, "checkpoint", [run])
    text = drawn(make(tmp_path / "analyze", "cka", [*steps, run]))
    assert "<td class=wrap>run steps 1,000 2,000</td>" in text


def test_scores_stand_in_the_order_of_the_models_whenever_they_were_taken(tmp_path):
    base = trained(tmp_path / "base")
    midtrain = trained(tmp_path / "midtrain", [base])
    text = drawn(scored(tmp_path / "a", [midtrain], names=["of_midtrain"]), scored(tmp_path / "b", [base], names=["of_base"]))
    assert text.index("of_base (b)") < text.index("of_midtrain (a)")
    assert "mean accuracy, of_base → of_midtrain" in text


def test_the_tile_of_accuracies_hides_no_fall(tmp_path):
    text = drawn(with_means(tmp_path / "scores", {"base": 0.015, "midtrained": 0.33, "rl": 0.225}))
    assert "<b>1.5 → 33.0 → 22.5\N{NO-BREAK SPACE}%</b><span>mean accuracy, base → midtrained → rl</span>" in text


def test_the_tile_of_many_models_tells_the_ends_the_lowest_and_the_highest(tmp_path):
    means = dict(zip("abcdefg", (0.2, 0.3, 0.1, 0.4, 0.9, 0.5, 0.6), strict=True))
    text = drawn(with_means(tmp_path / "scores", means))
    assert "<b>20.0 → 10.0 → 90.0 → 60.0\N{NO-BREAK SPACE}%</b>" in text
    assert "<span>mean accuracy, a → c → e → g (4 of 7 models: the ends, the lowest, the highest)</span>" in text


def test_of_two_figures_in_a_picture_the_first_alone_is_drawn_by_domain(tmp_path):
    line = {"reward": 0.5, "length": 3.0, "length/gcd": 2.0, "length_max": 9.0, "length_max/gcd": 8.0}
    line |= {"responses": 8, "tokens": 10, "seconds_per_step": 1.0, "lr": 1e-4}
    text = rl_section.section(gather([with_log(tmp_path / "rl", [{"step": step, **line} for step in (1, 2)], [{"task": "gcd", "count": 9}])]))
    assert 'data-name="mean gcd"' in text and 'data-name="longest"' in text and "longest gcd" not in text


def with_log(folder, lines, sources):
    prompts = {"prompts_per_step": 4, "sources": sources}
    return make(folder, "rl", files={"metrics.jsonl": lines}, steps=3, prompts=prompts, rollout={"responses_per_prompt": 2})


@pytest.mark.parametrize(
    ("sources", "said"),
    [([{"task": "gcd", "count": 1000}, {"task": "sums", "count": 500}], "12 were asked, of at most 1,500."), ([{"path": "data"}], "12 were asked.")],
    ids=["counted", "of files"],
)
def test_where_nothing_was_solved_from_zero_it_is_said_in_words(tmp_path, sources, said):
    same = {"reward": 0.5, "solved_from_zero": 0.0, "lr": 1e-4, "responses": 8, "tokens": 10, "seconds_per_step": 1.0}
    text = rl_section.section(gather([with_log(tmp_path / "rl", [{"step": step, **same} for step in (1, 2, 3)], sources)]))
    (figure,) = re.findall(r"<h4>Solved from zero</h4>.*?</figure>", text, re.DOTALL)
    assert f"None in any step. Only a prompt that is asked a second time can count: {said}" in figure and "<svg" not in figure


LOGARITHMIC = "The vertical axis is logarithmic"


def figures_of(text, title):
    return re.findall(rf"<h4>{title}</h4>.*?</figure>", text, re.DOTALL)


def test_a_logarithmic_axis_says_that_it_is(tmp_path):
    text = drawn(pipeline(tmp_path))
    norms = figures_of(text, "Gradient norm")
    assert len(norms) == 3, "of training by tokens and by steps, and of RL"
    assert all(LOGARITHMIC in figure for figure in norms)
    assert LOGARITHMIC in figures_of(text, "Mismatch of trainer and generator")[0]
    assert not any(LOGARITHMIC in figure for figure in figures_of(text, "Learning rate"))


def test_an_axis_that_a_zero_keeps_linear_is_not_said_to_be_logarithmic(tmp_path):
    same = {"reward": 0.5, "lr": 1e-4, "responses": 8, "tokens": 10, "seconds_per_step": 1.0}
    lines = [{"step": step, "grad_norm": float(step - 1), **same} for step in (1, 2, 3)]
    (figure,) = figures_of(rl_section.section(gather([with_log(tmp_path / "rl", lines, [])])), "Gradient norm")
    assert "logarithmic" not in figure
