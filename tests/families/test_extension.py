"""What an extension writes into config.json, as transformers reads it back, and what of it a checkpoint forbids."""

import json
from typing import Any

import pytest
from tiny_models import TINY

from megatron_prism import families
from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.families.extension import Extension, RopeChange, extended

PLAIN = {**TINY["llama"], "rope_scaling": None, "rope_theta": 10_000.0}  # 256 positions, heads of 16
SCALED = {
    "llama3": TINY["llama"],
    "yarn": {**PLAIN, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "linear": {**PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def changed(config: dict[str, Any], seq_len: int = 1024, length: int | None = None, window: Any = None, **rope: Any) -> dict[str, Any]:
    model = families.find(config).model_config(config)
    return extended(config, model, Extension(seq_len, length, validate(rope, RopeChange, "rope"), window))


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"kind": "theta", "theta": 1e6}, 1e6, None),
        ({"kind": "ntk"}, 1e4 * 4 ** (16 / 14), None),
        ({"kind": "ntk", "factor": 8.0}, 1e4 * 8 ** (16 / 14), None),
        ({"kind": "linear"}, 1e4, {"rope_type": "linear", "factor": 4.0}),
        ({"kind": "yarn"}, 1e4, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
        (
            {"kind": "yarn", "original_max_position_embeddings": 128, "beta_fast": 16.0, "attention_factor": 1.25},
            1e4,
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "attention_factor": 1.25},
        ),
        (
            {"kind": "llama3", "factor": 8.0},
            1e4,
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
)
@pytest.mark.parametrize("form", ["published", "transformers 5"])
def test_every_kind_is_written_as_transformers_reads_it(rope, theta, scaling, form, tmp_path):
    from transformers import AutoConfig

    config = {key: value for key, value in PLAIN.items() if key not in ("rope_scaling", "rope_theta")}
    config |= {"rope_theta": 1e4} if form == "published" else {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    result = changed(config, **rope)
    (tmp_path / "config.json").write_text(json.dumps(result))
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.max_position_embeddings == 1024
    block = {key: value for key, value in found.rope_parameters.items() if key != "rope_theta"}
    assert found.rope_parameters["rope_theta"] == pytest.approx(theta)
    assert block == (scaling or {"rope_type": "default"})
    model = families.find(result).model_config(result)
    assert model.rotary_base == pytest.approx(theta) and (model.rope_scaling is None) == (scaling is None)
    assert families.export_config(result).get("rope_theta", theta) == pytest.approx(theta)


def test_nothing_changes_where_nothing_was_asked_and_the_model_is_long_enough():
    granite = families.published("granite-3.3-8b-base")
    assert changed(granite, 131_072) == granite
    assert changed(TINY["granite_hybrid"], 1024) == {**TINY["granite_hybrid"], "max_position_embeddings": 1024}


def test_a_scaling_grows_by_its_own_kind():
    assert changed(SCALED["yarn"], kind="yarn")["rope_scaling"]["factor"] == 16.0
    assert changed(SCALED["yarn"], 128, kind="yarn", factor=8.0)["max_position_embeddings"] == 512
    assert changed(SCALED["linear"], kind="linear")["rope_scaling"]["factor"] == 16.0
    assert changed(SCALED["llama3"], kind="llama3")["rope_scaling"]["factor"] == 16.0
    llama = families.published("llama-3.1-8b")
    assert changed(llama, 131_072) == llama, "its factor is 8 for 8,192 to 131,072 positions"


@pytest.mark.parametrize(
    "rope", [{}, {"kind": "ntk"}, {"kind": "theta", "theta": 1e6}, {"kind": "llama3", "factor": 8.0}, {"kind": "yarn", "beta_fast": 16.0}]
)
def test_a_resolved_recipe_reads_back_as_it_was(rope):
    """What a run keeps in its config.toml names every key."""
    change = validate(rope, RopeChange, "rope")
    assert validate(change.model_dump(mode="json"), RopeChange, "rope") == change
    assert changed(PLAIN, **change.model_dump(mode="json", exclude_none=True)) == changed(PLAIN, **rope)


def test_a_larger_factor_leaves_the_shape_of_a_scaling_as_the_checkpoint_has_it():
    shaped = {**PLAIN, "rope_scaling": {**SCALED["yarn"]["rope_scaling"], "beta_fast": 16.0, "truncate": False, "attention_factor": 1.25}}
    expected = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "truncate": False}
    assert changed(shaped, kind="yarn")["rope_scaling"] == expected, "the factor of queries and keys follows from the new factor"
    assert changed(shaped, kind="yarn", beta_fast=24.0)["rope_scaling"] == {**expected, "beta_fast": 24.0}
    waves = {"low_freq_factor": 2.0, "high_freq_factor": 8.0}
    found = changed({**PLAIN, "rope_scaling": {**TINY["llama"]["rope_scaling"], **waves}}, kind="llama3", high_freq_factor=6.0)["rope_scaling"]
    assert (found["low_freq_factor"], found["high_freq_factor"]) == (2.0, 6.0)


def test_a_window_is_kept_or_removed_and_its_distance_counts():
    mistral = {**TINY["mistral"], "sliding_window": 64}
    assert changed(mistral, window="keep") == {**mistral, "max_position_embeddings": 1024}
    found = changed(mistral, window="remove", kind="yarn")
    assert found["sliding_window"] is None and families.find(found).model_config(found).sliding_window is None
    assert found["rope_scaling"] == {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "asked", "said"),
    [
        (PLAIN, {"length": 128}, "max_position_embeddings=128 must be at least the checkpoint's 256: an extension does not shorten; drop the key"),
        (PLAIN, {"length": 512}, "data.seq_len=1024 must be at most the model's largest length, 512; raise max_position_embeddings"),
        (PLAIN, {"kind": "theta", "theta": 9e3}, "rope.theta=9000 must be above the checkpoint's 10000"),
        (PLAIN, {"kind": "linear", "factor": 2.0}, "times the original length 256 is 512, which does not reach 1024; use rope.factor=4"),
        (PLAIN, {"kind": "ntk", "factor": 3.0}, "is 768, which does not reach 1024"),
        (PLAIN, {"kind": "yarn", "factor": 2.0}, "data.seq_len=1024 must be at most the model's largest length, 512"),
        (PLAIN, {"kind": "yarn", "factor": 8.0, "length": 1024}, "rope.factor=8 must be max_position_embeddings=1024 / 256 = 4"),
        (PLAIN, {"seq_len": 256, "kind": "ntk"}, "256 positions are no more than the 256 that the checkpoint was trained with; drop"),
        (PLAIN, {"kind": "ntk", "original_max_position_embeddings": 512}, "original_max_position_embeddings=512 contradicts the checkpoint"),
        (TINY["granite_hybrid"], {"kind": "yarn"}, "rope.kind=yarn: the checkpoint has no rotary embeddings, and needs no change"),
        (TINY["nemotron_h"], {"kind": "theta", "theta": 1e6}, "the checkpoint has no rotary embeddings"),
        (TINY["smollm3"], {"kind": "yarn"}, "which 1 layers of this model do without"),
        (SCALED["yarn"], {"kind": "linear"}, "contradicts the checkpoint, which has yarn scaling with factor 4 already; use rope.kind=unchanged"),
        (SCALED["yarn"], {}, "yarn scaling .factor 4. reaches 256 positions, not 1024; use rope.kind=yarn"),
        (SCALED["linear"], {}, "linear scaling .factor 4. reaches 256 positions"),
        (SCALED["llama3"], {"kind": "llama3", "factor": 8.0}, "rope.factor=8 must be above the factor 8 that the checkpoint has"),
        (SCALED["yarn"], {"kind": "yarn", "original_max_position_embeddings": 32}, "=32 contradicts the checkpoint, which was trained with 64"),
        (TINY["mistral"], {}, "sees 5 tokens back, however long the sequence: say sliding_window=remove"),
        (TINY["mistral"], {"window": "keep", "kind": "ntk"}, "rope.kind=ntk with sliding_window=keep"),
        (TINY["mistral"], {"window": "remove"}, "sliding_window=remove with rope.kind=unchanged"),
        (PLAIN, {"window": "keep"}, "the checkpoint has no sliding window; drop the key"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(config, asked, said):
    with pytest.raises(UserError, match=said):
        changed(config, **asked)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"kind": "theta"}, "rope.kind=theta needs rope.theta"),
        ({"theta": 1e6}, "rope.theta belongs to rope.kind=theta, not unchanged"),
        ({"kind": "llama3", "beta_fast": 16.0}, "rope.beta_fast belongs to rope.kind=yarn, not llama3"),
        ({"kind": "yarn", "beta_fast": 1.0}, "rope.beta_slow below rope.beta_fast"),
        ({"kind": "ntk", "factor": 0.5}, "greater than 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(rope, said):
    with pytest.raises(UserError, match=said):
        validate(rope, RopeChange, "rope")
