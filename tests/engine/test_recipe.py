"""What a training recipe refuses of precisions, optimizer states and recomputation, before torch is imported."""

import pytest

from megatron_prism import families
from megatron_prism.config import ParallelConfig, load_recipe
from megatron_prism.engine.recipe import TrainConfig, check_model, model_files
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan
from megatron_prism.stages import train

BASE = ["output=out", "model.hf_config=m", "model.tokenizer=m", "data.blend=b", "data.seq_len=8192", "steps=1", "global_batch=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=fp32", "fp8.recipe=tensorwise"], "fp8 works beside bf16"),
        (["fp8.recipe=delayed", "fp8.bf16_layers_at_start=1"], "scales all layers at once"),
        (["fp8.params=true", "fp8.recipe=delayed"], "use recipe=tensorwise"),
        (["fp8.params=true", "fp8.recipe=blockwise"], "use recipe=tensorwise"),
        (["fp8.params=true", "trainable=attention"], "frozen weights would be in FP8 alone"),
        (["attention_backend=flash", "precision=fp32"], "attention_backend=flash with precision=fp32"),
        (["attention_backend=flash", "layers=local", "parallel.cp=2"], "attention_backend=flash with layers=local, parallel.cp=2"),
        (["precision=fp32", "optimizer.split_master=true"], "are for bf16 weights"),
        (["optimizer.moments=bf16", "optimizer.betas=[0.9, 0.999]"], "is lost in bf16's"),
        (["recompute_layers=4"], "set recompute=full"),
        (["keep_attention=true"], "set recompute=full"),
        (["parallel.tp_comm_overlap=true", "parallel.tp=2"], "set tp to 2 or more and sp=true"),
        (["parallel.tp_comm_overlap=true", "parallel.tp=2", "parallel.sp=true", "layers=local"], "set it to false"),
        (["keep_attention=true", "recompute=full", "fp8.recipe=delayed"], "use fp8.recipe=tensorwise or blockwise, or keep_attention=false"),
        (["rope.kind=ntk"], "is changed by another stage: prism extend"),
        (["sliding_window=keep"], "is changed by another stage: prism extend"),
        (["offload_activations=true", "recompute=selective"], "recompute=selective is set; set recompute=full"),
        (["offload_activations=true", "recompute=full", "recompute_layers=2"], "recompute all, or offload nothing"),
        (["cuda_graphs=true", "device=cpu"], "device=cpu: graphs are CUDA's; use device=cuda, or cuda_graphs=false"),
        (["cuda_graphs=true", "parallel.tp=2"], "pp=1, tp=2, cp=1: exchanges inside a graph are not proved; use 1 for all three, or"),
        (["cuda_graphs=true", "parallel.pp=2"], "pp=2, tp=1, cp=1: exchanges inside a graph"),
        (["cuda_graphs=true", "parallel.cp=2"], "pp=1, tp=1, cp=2: exchanges inside a graph"),
        (["cuda_graphs=true", "data.packing.pad_multiple=16"], "data.packing: documents end elsewhere in every batch"),
        (["cuda_graphs=true", "hidden_dropout=0.1"], "hidden_dropout=0.1: its random numbers are not taken into a graph; use 0"),
        (["cuda_graphs=true", "recompute=selective"], "recompute=selective: it puts random states back"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, [*BASE, *overrides], TrainConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fp8.recipe=tensorwise", "recompute=full"], "computed again in bf16"),
        (["recompute=full", "recompute_layers=4"], "recomputes every layer"),
        (["parallel.tp=2", "parallel.sp=true", "parallel.tp_comm_overlap=true"], "leave it false for hybrids"),
        (["fp8.recipe=tensorwise", "fp8.bf16_layers_at_start=52"], "leave none of 52 layers in FP8"),
    ],
)
def test_what_a_hybrid_cannot_do_is_refused(overrides, message):
    cfg = load_recipe(None, [*BASE, *overrides], TrainConfig)
    config = families.published("nemotron-h-8b-base-8k")
    model = families.find(config).model_config(config)
    with pytest.raises(UserError, match=message):
        check_model(cfg, model, make_plan(model, ParallelConfig(), 1, 8192, global_batch=1, micro_batch=1))


def test_graphs_with_delayed_scaling_are_refused_where_ranks_agree_on_scales():
    cfg = load_recipe(None, [*BASE, "cuda_graphs=true", "fp8.recipe=delayed"], TrainConfig)
    config = families.published("llama-3.1-8b")
    model = families.find(config).model_config(config)
    check_model(cfg, model, make_plan(model, ParallelConfig(), 1, 8192, global_batch=1, micro_batch=1))
    with pytest.raises(UserError, match=r"on 2 data-parallel ranks: they agree on scales inside the pass.*use tensorwise or blockwise"):
        check_model(cfg, model, make_plan(model, ParallelConfig(), 2, 8192, global_batch=2, micro_batch=1))


def test_graphs_change_no_result_and_are_no_part_of_what_a_run_is():
    """Nor do data-parallel ranks' results, whose buckets are the same: tests/laws/test_micro_batches.py. Provenance says whether a run had them."""
    assert "cuda_graphs" not in load_recipe(None, [*BASE, "cuda_graphs=true"], TrainConfig).model_dump()


@pytest.mark.parametrize("name", ["", "model.json", "nowhere"])
def test_random_weights_ask_for_the_folder_that_holds_a_config(tmp_path, name):
    (tmp_path / "model.json").write_text("{}")
    start = [f"model.hf_config={tmp_path / name}", *(word for word in BASE if not word.startswith("model.hf_config"))]
    with pytest.raises(UserError, match=r"^model.hf_config=.*: for random weights give the folder that holds config.json; this holds none"):
        model_files(load_recipe(None, start, TrainConfig))
    (tmp_path / "config.json").write_text("{}")
    at_home = [f"model.hf_config={tmp_path / 'config.json'}", *start[1:]]
    assert model_files(load_recipe(None, at_home, TrainConfig)) == tmp_path


def test_a_recipe_that_lacks_its_model_names_a_key_that_gives_one():
    with pytest.raises(UserError, match=r"model is missing; it has no default \(what is trained, such as model.checkpoint=RUN\)"):
        load_recipe(None, [word for word in BASE if not word.startswith("model.")], TrainConfig)


def test_a_dry_run_before_its_checkpoint_is_made_names_the_plan(tmp_path):
    cfg = load_recipe(None, [f"model.checkpoint={tmp_path / 'later'}", *(word for word in BASE if not word.startswith("model."))], TrainConfig)
    with pytest.raises(UserError, match=r"later does not exist; run the stage that makes it. prism plan RECIPE --model MODEL shows sizes without it"):
        train.dry_run(cfg)
