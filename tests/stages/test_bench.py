"""`prism bench` as a user meets it: a tiny model on a CPU, its baselines beside it, failures, refusals, several ranks."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import TINY_LLAMA, VOCAB_SIZE, write_model_files

from megatron_prism import artifact, families
from megatron_prism.engine import device, parallel
from megatron_prism.engine.bench import bare, baselines, measure, sides, trace
from megatron_prism.engine.bench.cases import Case, Config, resolve
from megatron_prism.engine.bench.figures import PARTS
from megatron_prism.errors import UserError
from megatron_prism.planning.cost import flops_per_token, num_parameters
from megatron_prism.planning.layout import VOCABULARY_UNIT
from megatron_prism.stages import bench

SEQ_LEN, MICRO_BATCHES = 32, 2
PARAMETERS = num_parameters(families.find(TINY_LLAMA).model_config(TINY_LLAMA))
PADDING = -VOCAB_SIZE % VOCABULARY_UNIT * TINY_LLAMA["hidden_size"]
"""of the tied embedding's rows in megatron-core"""


def config(root: Path, **keys: Any) -> Config:
    model = root / "model"
    if not model.exists():
        write_model_files(model)
    train = {"data": {"seq_len": SEQ_LEN}, "device": "cpu", "precision": "fp32"}
    shared = {"output": root / "bench", "model": str(model), "micro_batches": MICRO_BATCHES, "warmup": 1, "steps": 5, "rounds": 5, "train": train}
    return Config(**{**shared, **keys})


def results(cfg: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cfg.output / bench.RESULTS).read_text())
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two cases: one with every baseline that there is, one whose loss is no number."""
    broken = {"name": "diverges", "train": {"optimizer": {"lr": 1e30}, "precision": "bf16"}}
    cases = [{"name": "beside", "baselines": "available", "profile": True}, {**broken, "baselines": []}]
    cfg = config(tmp_path_factory.mktemp("measured"), cases=cases)
    with pytest.raises(SystemExit, match="1"):
        bench.run(cfg)
    return cfg


@pytest.fixture
def tiny_case(tmp_path: Path):
    """A case, this process as its one rank, and the CPU."""
    (case,) = resolve(config(tmp_path), 1, tmp_path / "work")
    place = device.setup("cpu")
    parallel.start(place)
    yield case, parallel.build_mesh(case.plan, 1), place
    parallel.stop()


def test_rates_are_the_model_flops_of_the_median_step(measured):
    case = results(measured)["cases"][0]
    ours, model = case["ours"], families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    rate = MICRO_BATCHES * SEQ_LEN / (ours["step_ms"]["median"] / 1e3)
    assert case["tokens_per_step"] == MICRO_BATCHES * SEQ_LEN and case["parameters"] == PARAMETERS
    assert ours["tokens_per_second_per_gpu"] == pytest.approx(rate)
    assert ours["tflops_per_gpu_causal"] == pytest.approx(flops_per_token(model, SEQ_LEN) * rate / 1e12)
    assert ours["tflops_per_gpu_full"] > ours["tflops_per_gpu_causal"]
    assert ours["share_of_matmul_causal"] == pytest.approx(ours["tflops_per_gpu_causal"] / case["matmul_tflops"])
    assert ours["step_ms"]["min"] <= ours["step_ms"]["median"] <= ours["step_ms"]["max"]


def test_the_split_names_every_part_and_adds_up_to_the_mean_step(measured):
    case = results(measured)["cases"][0]
    for side in (case["ours"], case["baselines"]["bare_megatron_core"], case["baselines"]["transformers"]):
        parts = side["split_ms"]
        assert set(parts) == {*PARTS, "other"}
        assert sum(parts.values()) == pytest.approx(side["step_ms"]["mean"])
        assert all(value >= 0 for value in parts.values())
        assert all(parts[name] > 0 for name in ("forward", "backward", "optimizer"))
        assert parts["other"] < 0.5 * side["step_ms"]["mean"]
    assert case["ours"]["split_ms"]["data"] > 0 and case["ours"]["split_ms"]["reduction"] > 0


def test_baselines_train_the_same_model_in_turns_with_ours(measured):
    case = results(measured)["cases"][0]
    assert case["ours"]["step_ms"]["steps"] == 5  # the same for both: all three take turns
    assert case["ours"]["parameters_on_rank_0"] == PARAMETERS + PADDING
    for name in ("bare_megatron_core", "transformers"):
        side = case["baselines"][name]
        assert side["interleaved"] and side["ratio"]["rounds"] == side["step_ms"]["steps"] == 5
        assert side["ratio"]["min"] == side["ratio"]["lower_bound"] <= side["ratio"]["median"]
        assert side["parameters_on_rank_0"] == PARAMETERS + (PADDING if name == "bare_megatron_core" else 0)
        assert side["loss"] == pytest.approx(case["ours"]["loss"], rel=0.1)  # random tokens: near ln(97) on every side
    assert case["baselines"]["bare_megatron_core"]["in_turns_with"] == ["ours", "transformers"]
    assert case["baselines"]["transformers_liger"] == {"skipped": "Liger's kernels need CUDA"}
    assert "train.precision=fp32" in case["baselines"]["transformers_autocast"]["skipped"]


def test_a_case_that_fails_is_recorded_and_the_folder_is_not_complete(measured):
    failed = results(measured)["cases"][1]
    assert failed["name"] == "diverges" and "the loss is nan" in failed["failed"]
    assert not artifact.is_complete(measured.output)


def test_the_profile_of_a_step_is_kept_where_it_is_asked_for(measured):
    with gzip.open(measured.output / "traces" / "beside.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count(trace.STEP) >= 1 and "aten::mm" in names
    assert results(measured)["cases"][0]["ours"]["profile"] == {}  # communication and waits: not measured on a CPU


def test_results_say_what_they_are_figures_of(measured):
    found = results(measured)
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["ranks"] == 1
    assert "recomputation not" in found["conventions"]["tflops"]
    assert found["cases"][0]["matmul"].startswith("torch.mm, 512 cube, float32")


def test_sides_that_do_not_share_the_memory_run_one_after_the_other_and_say_so(tmp_path):
    cfg = config(tmp_path, baselines=["bare_megatron_core"], resident=False, steps=2, rounds=2)
    bench.run(cfg)
    (case,) = results(cfg)["cases"]
    side = case["baselines"]["bare_megatron_core"]
    assert not side["interleaved"] and any("not in turns" in note for note in side["notes"])
    assert case["ours"]["step_ms"]["steps"] == side["step_ms"]["steps"] == 2
    assert side["ratio"]["rounds"] == 2 and side["ratio"]["lower_bound"] is None
    artifact.require(cfg.output, "bench")


def test_a_baseline_that_fails_leaves_the_figures_of_the_others(tmp_path, monkeypatch):
    def broken(*_: Any) -> sides.Side:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(baselines.BASELINES, "transformers", broken)
    cfg = config(tmp_path, baselines=["bare_megatron_core", "transformers"], steps=1, rounds=1)
    with pytest.raises(SystemExit):
        bench.run(cfg)
    (case,) = results(cfg)["cases"]
    assert case["baselines"]["transformers"] == {"failed": "OutOfMemoryError: out of memory"}
    assert case["baselines"]["bare_megatron_core"]["ratio"]["rounds"] == 1


def test_sides_that_fail_together_try_again_one_by_one(tmp_path, monkeypatch):
    whole = measure.Bench.turns

    def only_two(self: measure.Bench, turns: Any, case: Case) -> None:
        if len(turns) > 2:
            raise torch.OutOfMemoryError("out of memory")
        whole(self, turns, case)

    monkeypatch.setattr(measure.Bench, "turns", only_two)
    cfg = config(tmp_path, baselines=["bare_megatron_core", "transformers"], steps=1, rounds=1)
    bench.run(cfg)
    (case,) = results(cfg)["cases"]
    assert [case["baselines"][name]["in_turns_with"] for name in ("bare_megatron_core", "transformers")] == [["ours"], ["ours"]]
    assert case["ours"]["step_ms"]["steps"] == 2  # once beside each


def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path, monkeypatch):
    cfg = config(tmp_path, cases=[{"name": "a"}, {"name": "b"}], steps=1, rounds=1)
    whole = measure.Bench.case

    def killed(self: measure.Bench, case: Case, traces: Path) -> dict[str, Any]:
        if case.name == "b":
            raise KeyboardInterrupt
        return whole(self, case, traces)

    monkeypatch.setattr(measure.Bench, "case", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.run(cfg)
    assert [case["name"] for case in results(cfg)["cases"]] == ["a"]


def test_no_case_begins_when_the_minutes_are_over(tmp_path):
    cfg = config(tmp_path, cases=[{"name": "a"}, {"name": "b"}], minutes=1e-9)
    with pytest.raises(SystemExit, match="1"):
        bench.run(cfg)
    assert results(cfg)["cases"] == [] and results(cfg)["not_begun"] == ["a", "b"]
    assert not artifact.is_complete(cfg.output)


@pytest.mark.parametrize(
    ("resident", "peak", "steady", "held", "fits"),
    [
        ("auto", 45.0, 34.0, 0.0, True),
        ("auto", 45.0, 34.0, 50.0, False),
        ("auto", 115.0, 95.0, 0.0, False),
        (True, 115.0, 95.0, 0.0, True),
        (False, 45.0, 34.0, 0.0, False),
    ],
)
def test_sides_share_a_gpu_where_all_fit_by_what_ours_took(tiny_case, monkeypatch, resident, peak, steady, held, fits):
    """GiB of the 8 layers and of the whole LLaMA-3.1-8B on an H200 of 140 GiB."""
    case, _, _ = tiny_case
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=140 * 2**30))
    wished = replace(case, options=case.options.model_copy(update={"resident": resident}))
    memory = {"peak_allocated_gib": peak, "between_steps_gib": steady}
    assert measure.Bench(torch.device("cuda", 0)).fits("bare_megatron_core", wished, memory, held) == fits


@pytest.mark.parametrize("kind", [sides.Ours, bare.BareLoop])
def test_a_side_gives_back_its_memory_whoever_still_refers_to_it(tiny_case, kind):
    side = kind(*tiny_case)
    side.step()
    model = side.engine.model[0] if kind is sides.Ours else side.model
    held = [*model.parameters(), *(buffer.grad_data for buffer in model.buffers)]
    assert all(tensor.untyped_storage().nbytes() for tensor in held)
    side.close()
    assert not any(tensor.untyped_storage().nbytes() for tensor in held)


def test_our_side_trains_as_prism_train_does(tiny_case):
    """The clocks around data, schedule and optimizer change no number: the losses of the bare functions, bit for bit."""
    from megatron_prism.engine import loop, step

    case, mesh, place = tiny_case
    timed = sides.Ours(case, mesh, place)
    found = []
    for _ in range(3):
        timed.step()
        found.append(timed.loss())
    mesh = parallel.build_mesh(case.plan, 1)
    engine, data = loop.build_engine(case.train, case.model, mesh, place), sides.read(case)
    adamw = case.train.optimizer
    losses = [step.train_step(engine, data, number * 2, adamw.lr, adamw.weight_decay).loss for number in range(3)]
    data.close()
    timed.close()
    assert found == losses


def test_our_side_checks_its_memory_where_the_case_does(tiny_case):
    case, mesh, place = tiny_case
    case = replace(case, train=case.train.model_copy(update={"check_memory": True}))
    side = sides.Ours(case, mesh, place)
    side.step()
    assert side.engine.optimizer.memory is not None and side.engine.optimizer.memory.known is not None
    side.close()


@pytest.mark.parametrize(
    ("model", "name", "parallel_keys", "words"),
    [
        ("nemotron-h-8b-base-8k:5", "bare_megatron_core", {}, "hybrid model needs CUDA and mamba-ssm"),
        ("llama-3.1-8b:2", "bare_megatron_core", {"pp": 2}, "no pipeline"),
        ("llama-3.1-8b:2", "bare_megatron_core", {"split_master": True}, "split master weights need TransformerEngine"),
        ("llama-3.1-8b:2", "transformers", {"tp": 2}, "data-parallel ranks alone"),
        ("llama-3.1-8b:2", "transformers_liger", {}, "need CUDA"),
        ("llama-3.1-8b:2", "without_cuda_graphs", {}, "set train.cuda_graphs=true"),
    ],
)
def test_a_baseline_that_cannot_run_is_refused_by_name_or_skipped(tmp_path, model, name, parallel_keys, words):
    adamw, parallel_keys = (parallel_keys, {}) if "split_master" in parallel_keys else ({}, parallel_keys)
    train = {"data": {"seq_len": SEQ_LEN}, "device": "cpu", "parallel": parallel_keys, "optimizer": adamw}
    cfg = config(tmp_path, model=model, vocab_size=64, train=train, baselines=[name])
    (case,) = resolve(cfg, 2 if parallel_keys else 1, tmp_path / "work")
    with pytest.raises(UserError, match=rf"{name}: .*{words}"):
        baselines.choose(case, device.CPU)
    available = case.options.model_copy(update={"baselines": "available"})
    chosen, skipped = baselines.choose(replace(case, options=available), device.CPU)
    assert name not in chosen and words in skipped[name]


def test_refusals_come_before_anything_is_written(tmp_path):
    cfg = config(tmp_path, baselines=["transformers_liger"])
    with pytest.raises(UserError, match="transformers_liger: Liger's kernels need CUDA"):
        bench.run(cfg)
    assert not cfg.output.exists()


def test_a_dry_run_prints_every_case_and_writes_nothing(tmp_path, capsys):
    cfg = config(tmp_path, cases=[{"name": "a", "baselines": ["transformers"]}, {"name": "b", "micro_batches": 4}])
    bench.dry_run(cfg)
    said = capsys.readouterr().out
    for words in ("case         a: 1 + 5 steps; baselines: transformers", "case         b", "per rank", "model FLOPs", "4 micro-batches of 1"):
        assert words in said
    assert not cfg.output.exists()


def test_a_dry_run_without_a_launch_plans_for_the_fewest_ranks_that_all_cases_allow(tmp_path, capsys):
    cfg = config(tmp_path, cases=[{"name": "cp", "train": {"parallel": {"cp": 2}}}, {"name": "dp"}])
    bench.dry_run(cfg)
    said = capsys.readouterr().out
    assert "mesh         2 ranks: tp=1 pp=1 cp=2 dp=1" in said
    assert "mesh         2 ranks: tp=1 pp=1 cp=1 dp=2" in said


def test_two_ranks_share_one_result_and_a_rank_that_fails_alone_ends_the_run(tmp_path, run_ranks):
    write_model_files(tmp_path / "model")
    done = run_ranks(Path(__file__).parent / "bench_ranks.py", 2, str(tmp_path), check=False)
    assert done.returncode != 0
    assert "rank 1: RuntimeError: only here; the ranks did not come together again" in done.stderr
    split, both = json.loads((tmp_path / "bench" / bench.RESULTS).read_text())["cases"][:2]
    assert (split["ranks"], split["global_batch"], split["baselines"]["bare_megatron_core"]["interleaved"]) == (2, 4, True)
    assert split["ours"]["tokens_per_second_per_gpu"] == pytest.approx(2 * SEQ_LEN / split["ours"]["step_ms"]["median"] * 1e3)
    assert both["failed"] == "RuntimeError: everywhere"
