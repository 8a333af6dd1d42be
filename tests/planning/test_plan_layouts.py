"""What `prism plan` says of layouts: the best few, where time and memory go, days and money, and why not the others."""

import re
import statistics
from pathlib import Path

import pytest
from test_measured_runs import RUNS, predicted

from megatron_prism.errors import UserError
from megatron_prism.planning.budget import budget
from megatron_prism.planning.layouts_text import CAUTION
from megatron_prism.stages.plan import Options, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GRANITE = EXAMPLES / "granite_3_3_8b" / "train.toml"
PAPER = sorted(path.parent.name for path in EXAMPLES.glob("*/pipeline.toml") if path.parent.name not in ("sft", "smollm2_135m", "tiny"))


def plan(capsys, target: Path | str, *overrides: str, memory: float | None = None, **options: object) -> str:
    run(str(target), overrides, Options(memory_gib=memory, **options))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return re.sub(r"\n {5,13}(?=\S)(?!tp  pp)", " ", text)


def granite(capsys, *overrides: str, **options: object) -> str:
    return plan(capsys, GRANITE, *overrides, **{"model": "granite-3.3-8b-base", "gpus": 64, "memory": 141.0, **options})


def rows(text: str) -> list[str]:
    """Of the table: mark, layout, recomputation, GiB, ms."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("       tp"))
    return lines[start + 1 : lines.index("", start)]


def test_a_recipe_has_its_own_layout_beside_the_best_few_with_overrides_to_paste(capsys):
    text = granite(capsys)
    own, *others = rows(text)
    assert own.startswith("own  2 sp   1  1   32 none           46.2")
    assert others[0].startswith("take    1   1  1   64 none           90.5")
    times = [int(re.findall(r" ([\d,]+)  +[\d,]+  [\d.]+%", row)[0].replace(",", "")) for row in others]
    assert times == sorted(times) and len(others) == 5
    assert "take     parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=1 recompute=none\n" in text
    assert "weights 15.2, gradients 30.4, optimizer 1.4, activations 43.4 GiB" in text


def test_what_is_pasted_becomes_the_recipes_own(capsys):
    taken = re.search(r"^take     (.*)$", granite(capsys), re.MULTILINE)
    assert taken is not None
    text = granite(capsys, *taken[1].split())
    assert rows(text)[0][5:] == rows(text)[1][5:] and "(the recipe as it is)" in text


def test_a_steps_terms_add_up_to_it_and_to_its_tokens_a_second(capsys):
    text = granite(capsys)
    terms = [float(ms.replace(",", "")) for ms in re.findall(r"^  \D.* ([\d,.]+) ms +[\d.]+%$", text, re.MULTILINE)]
    whole = re.search(r"^  all +([\d,.]+) ms ", text, re.MULTILINE)
    assert whole is not None
    milliseconds = float(whole[1].replace(",", ""))
    assert sum(terms) == pytest.approx(milliseconds, abs=0.5)
    assert f"{128 * 8192 / 64 / milliseconds * 1e3:,.0f} tokens/s and" in text


def test_days_gpu_hours_and_money_are_of_the_recipes_tokens_or_those_asked_for(capsys):
    text = granite(capsys, price=3.0)
    found = re.search(r"budget   26,214,400,000 tokens in 25,000 steps: ([\d.]+) hours, ([\d,]+) GPU-hours; ([\d,]+) at 3 a GPU-hour", text)
    assert found is not None
    hours, gpu_hours, money = (float(figure.replace(",", "")) for figure in found.groups())
    assert gpu_hours == pytest.approx(64 * hours, rel=0.01) and money == pytest.approx(3 * gpu_hours, abs=3)
    assert "1,000,341,504 tokens in 954 steps" in granite(capsys, tokens=10**9)
    assert budget(10**9, 2**20, 64, 2.0).days == pytest.approx(954 * 2 / 86400)


def test_every_layout_that_is_not_taken_has_its_reason(capsys):
    text = granite(capsys, memory=80.0, gpu="h200")
    short, full = text[text.index("why not") :], granite(capsys, memory=80.0, gpu="h200", everything=True)
    counts = [int(count) for count in re.findall(r"^ *(\d+) (?:too large|slower|predicted quicker|forbidden)", short, re.MULTILINE)]
    assert "too large, the nearest pp=4 vpp=2: 73.0 GiB, 1.0 too much, of which activations" in short
    assert re.search(r"\d+ slower, from 1\.\d\d x the time \(.*\) to \d\.\d\d x", short)
    assert "5 forbidden: parallel.pp=16 must divide num_layers=40" in short
    each = full[full.index("why not") :].splitlines()
    assert len([line for line in each if line.startswith("  ") and line[2] != " " and ": " in line and not line.split()[0].isdigit()]) == sum(counts)
    assert "  pp=16: forbidden: parallel.pp=16 must divide num_layers=40; try parallel.pp=20" in full


def test_rules_of_the_recipe_forbid_layouts_too(capsys):
    text = plan(
        capsys,
        EXAMPLES / "nemotron_h_8b" / "train.toml",
        "fp8.recipe=tensorwise",
        model="nemotron-h-8b-base-8k",
        gpus=8,
        memory=141.0,
        everything=True,
    )
    assert "tp=8, recompute full: forbidden: fp8 with recompute=full: a hybrid's layers would be computed again in bf16" in text
    assert "8,192 tokens a sequence, 128 sequences a step, FP8" in text


def test_a_recipe_whose_layout_these_gpus_forbid_still_gets_others(capsys):
    text = granite(capsys, "parallel.tp=8", "parallel.cp=3", "data.seq_len=8192", gpus=8)
    assert "layout       not allowed: parallel.cp=3 must cut data.seq_len=8192 into 2*cp equal chunks" in text
    assert rows(text)[0].startswith("take")


def test_where_all_layers_run_again_fewer_of_them_are_offered(capsys):
    text = plan(capsys, "llama-3.1-8b", gpus=8, memory=60.0, seq_len=32_768, gpu="h200")
    found = re.search(r"or       recompute_layers=(\d+) of (\d+) beside it: ([\d.]+) GiB, (\d+)% less time", text)
    assert found is not None and int(found[1]) < int(found[2]) and float(found[3]) <= 54 and int(found[4]) >= 2


def test_the_overlap_of_tps_exchange_is_offered_to_dense_models(capsys):
    assert "or       parallel.tp_comm_overlap=true beside it: 4% less time" in plan(capsys, "llama-3.1-8b", gpus=8, memory=80.0)
    assert "tp_comm_overlap" not in plan(capsys, "nemotron-h-8b-base-8k", gpus=8, memory=80.0)


def test_what_a_recipe_recomputes_binds_its_own_layout_alone(capsys):
    text = granite(capsys, "recompute=full", "recompute_layers=10")
    assert "32 10 layers " in rows(text)[0] and "take     parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=1 recompute=none" in text


def test_time_alone_is_said_without_memory_and_whose_rates_it_is_by(capsys):
    text = granite(capsys, memory=None)
    assert "rates    H200, measured on H200s" in text and "with --memory GiB, other layouts too" in text
    assert "rates    H100, not measured" in granite(capsys, memory=80.0)
    assert "rates    B300, not measured: an H200's, times 2.00" in granite(capsys, gpu="b300", tflops=1570.0)


def test_fp32_has_no_rates(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    assert "no rates for precision=fp32" in plan(capsys, EXAMPLES / "tiny" / "base.toml", gpus=2, memory=80.0)


@pytest.mark.parametrize("folder", PAPER)
def test_each_of_the_papers_pipelines_is_planned_within_its_limits(capsys, folder):
    text = plan(capsys, EXAMPLES / folder / "pipeline.toml", memory=80.0, price=2.0)
    for name in ("midtrain", "extended"):
        found = re.search(rf"^{name} +32 .* (\d+\.\d)  +[\d,]+ +[\d,]+ +([\d.]+) +(\d+)$", text, re.MULTILINE)
        assert found is not None, text
        assert float(found[1]) <= 72 and float(found[2]) < float(found[3])
    assert re.search(r"together .* GPU-hours; [\d,]+ at 2 a GPU-hour", text)
    assert "besides  base, data" in text


def test_the_papers_pipelines_are_seven():
    assert len(PAPER) == 7


def test_a_pipeline_without_training_is_refused(tmp_path):
    (tmp_path / "p.toml").write_text('[[stage]]\nname = "base"\nstage = "convert"\n')
    with pytest.raises(UserError, match="has no training stage"):
        run(str(tmp_path / "p.toml"), [], Options())


def test_a_stage_that_its_gpus_do_not_allow_is_named(capsys):
    with pytest.raises(UserError, match=r"stage midtrain on 12 GPUs: global_batch=128 must be a multiple of dp=6 \* micro_batch=1"):
        run(str(GRANITE.parent / "pipeline.toml"), [], Options(gpus=12))


def test_a_stage_in_fp32_is_not_predicted(capsys):
    with pytest.raises(UserError, match="no training stage in bf16 or FP8"):
        run(str(EXAMPLES / "tiny" / "pipeline.toml"), [], Options(model="llama-3.1-8b"))


def test_what_is_said_of_the_predictions_is_what_they_are():
    ratios = [(run["step_ms"] / predicted(run)[0], "host_bound" in run) for run in RUNS]
    errors = [abs(1 / ratio - 1) for ratio, _ in ratios]
    within, count, median, longest = re.findall(r"(\d+) of (\d+) runs .* median (\d+) %; the other four .* up to ([\d.]+) times", CAUTION)[0]
    assert (int(within), int(count)) == (sum(error <= 0.2 for error in errors), len(errors))
    assert round(100 * statistics.median(errors)) == int(median)
    assert [held_up for (_, held_up), error in zip(ratios, errors, strict=True) if error > 0.2] == [True] * 4
    assert round(max(ratio for ratio, _ in ratios), 1) == float(longest)


def test_cuda_graphs_are_in_the_plan(capsys):
    """128 GPUs: without graphs the exchange of dp hides behind the passes."""
    alone, graphs = (granite(capsys, f"cuda_graphs={on}", "parallel.tp=1", "parallel.sp=false", gpus=128) for on in ("false", "true"))
    assert "exchange of dp" not in alone and re.search(r"exchange of dp, as far as it shows +2\d\d\.\d ms", graphs)
    assert "graphs       no exchange beside the passes" in graphs and "a step, bf16, CUDA graphs" in graphs
