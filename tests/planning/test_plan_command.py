"""`prism plan` as people type it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training import TINY_LLAMA

from megatron_prism import families
from megatron_prism.errors import UserError
from megatron_prism.stages import plan as planner
from megatron_prism.stages.plan import Options, find_model, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GRANITE = EXAMPLES / "granite_3_3_8b" / "train.toml"


def plan(capsys, target: str | Path, *overrides: str, memory: float | None = None, **options: object) -> str:
    run(str(target), overrides, Options(memory_gib=memory, **options))
    return capsys.readouterr().out


def describe_recipe(path: Path, overrides: list[str], model: str | None, gpus: int | None, memory: float | None, seq_len: int | None) -> str:
    return planner.describe_recipe(path, overrides, Options(model, gpus, memory, seq_len))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("granite-3.3-8b-base", "8,170,835,968"), ("granite-4.0-micro-base", "3,402,836,480"), ("granite-4.0-h-micro-base", "3,191,396,096"),
        ("llama-3.1-8b", "8,030,261,248"), ("mistral-7b-v0.1", "7,241,732,096"), ("mistral-small-24b-base-2501", "23,572,403,200"),
        ("nemotron-h-8b-base-8k", "8,100,852,736"), ("smollm3-3b-base", "3,075,098,624"),
    ],
)  # fmt: skip
def test_a_published_model_is_counted_exactly(capsys, name, parameters):
    assert parameters in plan(capsys, name)


def test_a_models_plan_has_parts_pattern_flops_and_bytes(capsys):
    text = plan(capsys, "nemotron-h-8b-base-8k")
    assert "52 layers, 4 attention, 24 MLP, 24 Mamba-2" in text
    assert "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-" in text
    assert "46.71e9 a token at 8,192 tokens with causal attention, 47.52e9 with" in text
    assert "weights 15.09 GiB" in text


def test_a_layout_that_fits_is_recommended_with_its_overrides(capsys):
    text = plan(capsys, "llama-3.1-8b", gpus=8, memory=80.0)
    assert "take     parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=1 recompute=none global_batch=128" in words(text)
    assert "fits: 52.5 GiB of 80 GiB" in words(text)


def test_what_is_recommended_can_be_pasted_behind_a_recipe_with_settings_of_another_layout(capsys):
    own = ["parallel.tp=2", "parallel.sp=true", "parallel.tp_comm_overlap=true", "recompute=full", "recompute_layers=4", "keep_attention=true"]
    given = {"model": "granite-3.3-8b-base", "gpus": 64, "memory": 141.0}
    (taken,) = re.findall(r"take     (parallel.*?)\nbecause", words(plan(capsys, GRANITE, *own, **given)))
    assert "(the recipe as it is)" in plan(capsys, GRANITE, *own, *taken.split(), **given)


def words(text: str) -> str:
    """Without the breaks of lines."""
    return re.sub(r"\n {5,}", " ", text)


def test_a_folder_or_its_config_json_is_a_model_too(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    model = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "config.json")) == model


def test_a_recipe_is_planned_before_its_checkpoint_and_data_exist():
    text = describe_recipe(GRANITE, ["parallel.tp=4"], "granite-3.3-8b-base", 16, 80.0, None)
    assert "16 ranks: tp=4 sp pp=1 cp=1 dp=4" in text
    assert "tokens       26,214,400,000" in text
    assert "memory       fits: " in text
    assert "does not fit" in describe_recipe(GRANITE, [], "granite-3.3-8b-base", 8, 40.0, None)
    assert "x 4,096" in describe_recipe(GRANITE, ["global_batch=256"], "granite-3.3-8b-base", 8, None, 4096)


def test_a_recipes_optimizer_fp8_and_recomputation_change_its_plan():
    compact = ["optimizer.gradients=bf16", "optimizer.moments=bf16", "optimizer.split_master=true"]

    def figures(*overrides: str, model: str = "granite-3.3-8b-base") -> str:
        text = describe_recipe(GRANITE, overrides, model, 8, None, None)
        return text[text.index("per rank") : text.index("tokens ")] + text[text.index("model FLOPs") :]

    texts = [figures(), figures(*compact), figures("fp8.recipe=delayed"), figures("recompute=full"), figures("recompute=full", "recompute_layers=10")]
    assert len(set(texts)) == 5
    assert "2 a weight, 2 a gradient, 6 of optimizer" in texts[1]
    assert "recompute=full of 10 of 40 layers adds" in texts[4]
    with pytest.raises(UserError, match="with tp=8 these are not"):
        figures("fp8.recipe=tensorwise", "parallel.tp=8", model="granite-4.0-h-micro-base")
    with pytest.raises(UserError, match="recompute_layers=10: a hybrid model recomputes every layer"):
        figures("recompute=full", "recompute_layers=10", model="granite-4.0-h-micro-base")


def test_a_recipe_of_a_pipeline_needs_no_paths_for_its_plan():
    text = describe_recipe(EXAMPLES / "smollm2_135m" / "train.toml", [], "llama-3.1-8b", 2, None, None)
    assert "mesh         2 ranks" in text


def test_a_recipe_that_starts_from_random_weights_needs_no_tokenizer_for_its_plan(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    assert "parameters   1,066,112 (llama)" in describe_recipe(EXAMPLES / "tiny" / "base.toml", [], None, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "lama-3.1-8b"}, r"nor a published model; did you mean llama-3\.1-8b"),
        ({"target": "nemotron-h-8b"}, "did you mean nemotron-h-8b-base-8k"),
        ({"target": "quux"}, "published models: granite-3"),
        ({"target": "llama-3.1-8b", "memory": 80.0}, "say how many there are with --gpus"),
        ({"target": "llama-3.1-8b", "overrides": ["steps=2"]}, "steps=2 goes with a recipe"),
        ({"target": str(GRANITE)}, "starts from runs/granite-3.3-8b/base, which does not exist yet; name the model with --model"),
        ({"target": str(EXAMPLES / "smollm2_135m" / "train.toml")}, "leaves its model to a pipeline; name it with --model"),
        ({"target": "nowhere.toml"}, r"nowhere\.toml does not exist"),
        ({"target": str(GRANITE), "model": "granite-3.3-8b-base", "overrides": ["stpes=2"]}, "unknown key stpes; did you mean steps"),
        ({"target": str(GRANITE), "model": "granite-3.3-8b-base", "gpus": 3}, r"parallel\.tp\*pp\*cp=2 must divide the 3 ranks"),
        ({"target": str(GRANITE), "model": "granite-3.3-8b-base", "gpus": 3, "memory": 141.0}, "no layout of 3 GPUs is allowed; 2 were tried"),
        (
            {"target": str(GRANITE), "model": "granite-3.3-8b-base", "gpus": 8, "memory": 10.0},
            "nothing fits 8 GPUs of 10 GiB with 10% to spare; the nearest",
        ),
        (
            {"target": "llama-3.1-8b", "gpus": 1, "memory": 80.0},
            r"nothing fits 1 GPU of 80 GiB.* optimizer\.split_master=true needs 76\.5 GiB there",
        ),
        ({"target": "llama-3.1-8b", "gpus": 8, "gpu": "b200"}, r"--gpu b200: no rates for this GPU .*--gpu b200 --tflops N"),
        ({"target": str(EXAMPLES / "sft" / "pipeline.toml"), "overrides": ["steps=2"]}, "steps=2: a pipeline's keys stand in its stages"),
    ],
)
def test_what_cannot_be_planned_is_said_with_the_way_out(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = dict(arguments)
    target, overrides = given.pop("target"), given.pop("overrides", [])
    with pytest.raises(UserError, match=message):
        run(target, overrides, Options(memory_gib=given.pop("memory", None), **given))


def test_the_command_prints_a_plan_without_torch():
    code = "import sys; from megatron_prism.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "llama-3.1-8b", "--gpus", "8", "--memory", "80"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "take     parallel.tp=2" in done.stdout
    assert done.stderr.strip() == "False"


def test_sequences_longer_than_the_model_knows_are_pointed_out(capsys):
    assert "8,193 tokens exceed max_position_embeddings=8,192" in plan(capsys, "nemotron-h-8b-base-8k", seq_len=8193)
    assert "exceed" not in plan(capsys, "nemotron-h-8b-base-8k", seq_len=8192)
