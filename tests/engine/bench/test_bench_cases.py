"""A benchmark's recipe becomes checked cases: shared keys, changes, models cut to their first layers, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from training import write_model_files

from megatron_prism import families
from megatron_prism.config import load_recipe, to_toml
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.manifest import verify
from megatron_prism.engine.bench import cases
from megatron_prism.engine.bench.cases import CaseConfig, Config, resolve
from megatron_prism.engine.cuda_graphs import WARM_STEPS
from megatron_prism.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "bench").glob("*.toml"))
SHAPES = {
    "families": (1, {8192}),
    "three_billion": (1, {8192}),
    "one_h200": (1, {8192}),
    "attention": (1, {8192, 32768}),
    "two_h200": (2, {8192}),
    "long_context": (2, {131072}),
    "long_context_one": (1, {131072}),
    "context_curve": (1, {8192, 16384, 32768, 65536, 131072}),
    "context_parallel_64k": (2, {65536}),
    "eight_h200": (8, {8192, 131072}),
    "fp8_params": (1, {8192}),
}
"""recipe -> its ranks, and the lengths of its cases"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_model_files(tmp_path / "tiny"))


def config(**keys: Any) -> Config:
    return Config(**{"output": Path("out"), **keys})


def tiny_config(tiny: str, *changes: dict[str, Any], **keys: Any) -> Config:
    return config(**{"model": tiny, "train": {"data": {"seq_len": 32}, "device": "cpu"}, "cases": list(changes), **keys})


def test_a_case_is_the_shared_keys_with_its_own_over_them(tiny, tmp_path):
    cfg = tiny_config(tiny, {"name": "a", "train": {"optimizer": {"lr": 1e-4}}}, {"name": "b", "vocab_size": 50, "steps": 3})
    a, b = resolve(cfg, 1, tmp_path / "work")
    assert (a.train.optimizer.lr, a.train.data.seq_len, a.model.vocab_size, a.options.steps) == (1e-4, 32, 97, 10)
    assert (b.train.optimizer.lr, b.train.data.seq_len, b.model.vocab_size, b.options.steps) == (5e-5, 32, 50, 3)


def test_some_of_the_cases_can_be_chosen_by_name(tiny, tmp_path):
    cfg = tiny_config(tiny, {"name": "a"}, {"name": "b"}, {"name": "c"}, only=["a", "c"])
    assert [case.name for case in resolve(cfg, 1, tmp_path / "work")] == ["a", "c"]


def test_micro_batches_are_those_of_each_data_parallel_rank(tiny, tmp_path):
    cfg = tiny_config(tiny, {"name": "a", "micro_batches": 3, "train": {"micro_batch": 2}}, {"name": "b", "train": {"global_batch": 8}})
    a, b = resolve(cfg, 4, tmp_path / "work")
    assert (a.train.global_batch, a.plan.num_microbatches, a.plan.dp) == (24, 3, 4)
    assert (b.train.global_batch, b.plan.num_microbatches) == (8, 2)
    assert a.tokens_per_step == 24 * 32


def test_new_keys_of_a_training_recipe_need_no_change_here(tiny, tmp_path):
    cfg = tiny_config(tiny, train={"data": {"seq_len": 32}, "fp8": {"recipe": "blockwise"}, "recompute": "full", "optimizer": {"clip_grad": "none"}})
    (case,) = resolve(cfg, 1, tmp_path / "work")
    assert case.train.fp8 is not None and case.train.fp8.recipe == "blockwise"
    assert case.train.recompute == "full" and case.train.optimizer.clip_grad is None


def test_the_recorded_recipe_reads_back_as_the_same_benchmark(tiny, tmp_path):
    cfg = tiny_config(tiny, {"vocab_size": None, "train": {"optimizer": {"clip_grad": None}}}, vocab_size=50)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(cfg))
    again = load_recipe(path, [], Config)
    assert again == cfg
    assert again.each()[0][1].vocab_size is None


def test_the_first_layers_of_a_hybrid_are_those_of_its_pattern():
    found = cases.model_config("nemotron-h-8b-base-8k:13", 32000)
    model = families.find(found).model_config(found)
    assert (model.hybrid_layer_pattern, model.num_layers, model.vocab_size) == ("M-M-M-M*-M-M-", 13, 32000)
    granite = cases.model_config("granite-4.0-h-micro-base:6", None)
    assert families.find(granite).model_config(granite).hybrid_layer_pattern == "M-M-M-M-M-*-"


def test_special_tokens_beyond_a_smaller_vocabulary_go():
    assert cases.model_config("llama-3.1-8b:1", 32000)["bos_token_id"] is None
    assert cases.model_config("llama-3.1-8b:1", None)["bos_token_id"] == 128000


def test_random_tokens_are_shards_like_any_others_and_the_same_each_time(tmp_path):
    blends = [cases.random_blend(tmp_path / name, 100, 16) for name in ("a", "b")]
    first, second = (verify(load_blend(blend).sources[0].train, full=True) for blend in blends)
    assert first.digest() == second.digest()
    assert (first.num_tokens, first.vocab_size) == (cases.SEQUENCES * 17, 100)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": "llama-3.1-8"}, "did you mean llama-3.1-8b"),
        ({"model": "llama-3.1-8b:x"}, "NAME:LAYERS"),
        ({"model": "llama-3.1-8b:33"}, "the model has 32 layers, 33 were asked for"),
        ({"train": {"optimizer": {"lrr": 1}}}, "case .*: train: unknown key optimizer.lrr; did you mean optimizer.lr"),
        ({"train": {"steps": 5}}, "train.steps has no meaning in a benchmark; set steps"),
        ({"train": {"model": {}}}, "set model"),
        ({"train": {"global_batch": 2}, "micro_batches": 2}, "say the same"),
        ({"train": {"parallel": {"tp": 3}}}, "must divide"),
        ({"cases": [{"name": "a"}, {"name": "a"}]}, "names of their own; a is there more than once"),
        ({"cases": [{"warmups": 3}]}, "cases.0: unknown key warmups; did you mean warmup"),
        ({"model": None}, "has no model"),
        ({"cases": [{"name": "a"}, {"name": "b"}], "only": ["c"]}, "no cases of these names; there are a, b"),
        ({"baselines": ["bare"]}, "baselines"),
        ({"cases": [{"name": "a"}, {"name": "b", "train": {"device": "cuda"}}]}, "share train.device"),
        ({"train": {"cuda_graphs": True}, "warmup": 3}, "warmup=3 with train.cuda_graphs=true would time steps without a graph.*warmup=4 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(tiny, tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        resolve(tiny_config(tiny, **keys), 1, tmp_path / "work")


def test_the_fewest_steps_of_warm_up_with_graphs_are_the_eager_ones_the_capture_and_one_more():
    assert cases.GRAPHS_WARMUP == WARM_STEPS + 2
    options = CaseConfig(model="llama-3.1-8b:1", warmup=cases.GRAPHS_WARMUP, train={"cuda_graphs": True, "device": "cuda"})
    assert cases.planned(options, 1)[1].cuda_graphs


def test_refusals_are_errors_for_people(tiny, tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        resolve(tiny_config(tiny, model="mistral-7b"), 1, tmp_path / "work")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_whole(path: Path, tmp_path: Path):
    ranks, lengths = SHAPES[path.stem]
    found = resolve(load_recipe(path, [], Config), ranks, tmp_path)
    assert len(found) >= 2
    assert {case.train.data.seq_len for case in found} == lengths
    assert all(case.train.precision == "bf16" for case in found)
