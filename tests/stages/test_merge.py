"""`prism merge`: the result is the weighted mean of its parents, from and to any form; what does not fit together is refused before any work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prism_command import prism
from safetensors.torch import load_file
from tiny_models import edit_config, imported, write_pairs, write_tiny
from training import from_random, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe, validate
from megatron_prism.engine import loop, parallel, run_folder, sharded, weights
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError
from megatron_prism.families.components import COMPONENTS, component
from megatron_prism.stages import merge

SHARES = (0.15, 0.85)
PARTS = {
    "embed": "embeddings",
    "lm_head": "lm_head",
    "self_attn": "attention",
    "shared_mlp": "mlp",
    ".mlp.": "mlp",
    "mamba": "mamba",
}
"""an independent reading of Hugging Face names, norms apart"""


def config(*models: tuple[Path, float] | dict[str, Any], **values: Any) -> merge.Config:
    listed = [model if isinstance(model, dict) else {"path": str(model[0]), "weight": model[1]} for model in models]
    return validate(
        {"models": listed, **{key: str(value) if isinstance(value, Path) else value for key, value in values.items()}}, merge.Config, "test"
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, or of a checkpoint's export in fp32."""
    if (folder / "sharded").is_dir():
        folder = weights.write_hf(folder, folder.parent / f"{folder.name}_exported", "float32")
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_mean(found: dict[str, torch.Tensor], parents: list[dict[str, torch.Tensor]], shares: Any) -> None:
    """Each element is the mean in float64 of fp32 weights, to half an ulp of fp32 (at the size of its terms) for each product and a division.

    shares: weights, or a function of a tensor's name.
    """
    for name in parents[0].keys() | found.keys():
        own = np.array(shares(name) if callable(shares) else shares, dtype=np.float32).astype(np.float64)
        terms = np.stack([share * parent[name].double().numpy() for share, parent in zip(own, parents, strict=True)])
        total = np.float32(own.sum())
        roundings = len(parents) + (total != 1)
        bound = roundings / 2 * np.spacing(np.abs(terms).sum(axis=0).astype(np.float32))
        assert found[name].dtype == torch.float32
        error = np.abs(found[name].double().numpy() - terms.sum(axis=0) / total)
        assert (error <= bound).all(), name


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models each of a dense and a hybrid family: Hugging Face folders, and a checkpoint of the second in another layout."""
    root = write_pairs(tmp_path_factory.mktemp("models"))
    for name in ("llama", "granite_hybrid"):
        imported(root / f"{name}1", root / f"{name}1_checkpoint", tp=2, pp=2)
    return root


@pytest.mark.parametrize("name", ["llama", "granite_hybrid"])
def test_a_folder_and_a_checkpoint_become_their_mean_in_either_form(models, tmp_path, name):
    first, second = models / f"{name}0", models / f"{name}1_checkpoint"
    pair = [(first, SHARES[0]), (second, SHARES[1])]
    checkpoint = merge.run(config(*pair, output=tmp_path / "checkpoint", tp=4, pp=2))
    folder = merge.run(config(*pair, output=tmp_path / "hf", format="hf"))
    expected = [weights_of(first), weights_of(models / f"{name}1")]
    assert_mean(weights_of(checkpoint), expected, SHARES)
    assert all(torch.equal(tensor, weights_of(checkpoint)[key]) for key, tensor in weights_of(folder).items())
    assert artifact.require(checkpoint, "checkpoint")["parents"] == {str(second): artifact.digest(second)}
    assert [origin["weight"] for origin in artifact.require(folder, "hf")["merged"]] == list(SHARES)
    assert (folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_parts_have_weights_of_their_own(models, tmp_path):
    first, second = models / "granite_hybrid0", models / "granite_hybrid1"
    parts = {"embeddings": 1.0, "attention": 0.3, "mlp": -0.2, "mamba": 0.5, "norms": 0.0}
    rest = {part: 1.0 - share for part, share in parts.items()}
    models_given = [{"path": str(first), "weight": 0.15, "parts": parts}, {"path": str(second), "weight": 0.85, "parts": rest}]
    found = weights_of(merge.run(config(*models_given, output=tmp_path / "merged", format="hf")))

    def shares(name: str) -> tuple[float, float]:
        part = "norms" if "layernorm" in name or name == "model.norm.weight" else next(part for mark, part in PARTS.items() if mark in name)
        return parts[part], rest[part]

    assert_mean(found, [weights_of(first), weights_of(second)], shares)
    assert torch.equal(found["model.embed_tokens.weight"], weights_of(first)["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], weights_of(second)["model.norm.weight"])


def test_every_weight_of_every_family_has_a_part(tmp_path):
    from tiny_models import TINY

    from megatron_prism import families

    seen = set()
    for content in TINY.values():
        family = families.find(content)
        seen |= {component(entry.rule.key) for entry in family.rules(family.model_config(content))}
    assert seen == set(COMPONENTS)


def test_many_models_and_sums_that_are_divided(models, tmp_path):
    third = write_tiny("llama", tmp_path / "llama2", seed=2)
    folders = [models / "llama0", models / "llama1", third]
    found = merge.run(config(*zip(folders, [1, 2, 5], strict=True), output=tmp_path / "out", format="hf", normalize=True))
    assert_mean(weights_of(found), [weights_of(folder) for folder in folders], [1 / 8, 2 / 8, 5 / 8])
    thirds = merge.run(config(*zip(folders, [0.333333, 0.333333, 0.333334], strict=True), output=tmp_path / "thirds", format="hf"))
    assert_mean(weights_of(thirds), [weights_of(folder) for folder in folders], [0.333333, 0.333333, 0.333334])


def test_slerp_keeps_lengths_and_ends_at_its_ends(models, tmp_path):
    first, second = weights_of(models / "llama0"), weights_of(models / "llama1")
    pair = models / "llama0", models / "llama1"
    found = weights_of(merge.run(config(*zip(pair, SHARES, strict=True), output=tmp_path / "out", format="hf", method="slerp")))
    for name, tensor in found.items():
        x, y = first[name].double(), second[name].double()
        angle = torch.acos((x * y).sum() / x.norm() / y.norm())
        expected = (x * torch.sin(SHARES[0] * angle) + y * torch.sin(SHARES[1] * angle)) / torch.sin(angle)
        assert torch.allclose(tensor.double(), expected, rtol=1e-5, atol=1e-6), name
    end = weights_of(merge.run(config(*zip(pair, (0.0, 1.0), strict=True), output=tmp_path / "end", format="hf", method="slerp")))
    assert all(torch.equal(end[name], tensor) for name, tensor in second.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A bf16 run of two steps from random weights, with both of its checkpoints."""
    root = tmp_path_factory.mktemp("trained")
    settings = {"precision": "bf16", "steps": 2, "checkpoint__save_interval": 1, "optimizer__lr": 1e-3}
    try:
        return loop.train(load_recipe(None, recipe(root, root / "run", **from_random(root), **settings), TrainConfig))
    finally:
        parallel.stop()


def test_checkpoints_trained_in_bf16_are_merged_from_their_masters(trained, tmp_path):
    one, two = run_folder.complete_steps(trained)
    merged = merge.run(config((one, 0.5), (trained, 0.5), output=tmp_path / "merged", dtype="float32"))
    found, steps = sharded.Reader(merged / "sharded"), [sharded.Reader(step / "sharded") for step in (one, two)]
    for key in found:
        masters = [step.read(weights.MASTERS + key).double() for step in steps]
        rows = found.shape(key)[0]
        mean = (masters[0] + masters[1])[:rows] / 2
        assert torch.equal(found.read(key), mean.float()), key
        assert not torch.equal(mean, mean.bfloat16().double()), "masters have more digits than bf16"


def test_a_merged_checkpoint_is_trained_on(models, trained, tmp_path):
    one, two = run_folder.complete_steps(trained)
    merged = merge.run(config((one, SHARES[0]), (two, SHARES[1]), output=tmp_path / "merged", dtype="float32", tp=2))
    cfg = load_recipe(None, recipe(trained.parent, tmp_path / "run", model__checkpoint=str(merged), optimizer__lr=1e-30, steps=1), TrainConfig)
    try:
        loop.train(cfg)
    finally:
        parallel.stop()
    before, after = weights_of(merged), weights_of(run_folder.newest(tmp_path / "run"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert artifact.require(tmp_path / "run")["parents"][str(merged)] == artifact.digest(merged)


def test_types_are_those_of_the_first_model_and_decay_rates_stay_fp32(tmp_path):
    folders = [write_tiny("granite_hybrid", tmp_path / f"bf16_{seed}", torch.bfloat16, seed=seed) for seed in (0, 1)]
    found = weights_of(merge.run(config(*zip(folders, SHARES, strict=True), output=tmp_path / "hf", format="hf")))
    parents = [weights_of(folder) for folder in folders]
    for name, tensor in found.items():
        mean = sum(share * parent[name].double() for share, parent in zip(SHARES, parents, strict=True))
        kept = name.endswith(("A_log", "dt_bias", ".D"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.allclose(tensor.double(), mean, rtol=1e-6 if kept else 2**-8, atol=1e-6), name
    checkpoint = merge.run(config(*zip(folders, SHARES, strict=True), output=tmp_path / "checkpoint"))
    assert sharded.Reader(checkpoint / "sharded").dtype("embedding.word_embeddings.weight") == torch.bfloat16
    wide = weights_of(merge.run(config(*zip(folders, SHARES, strict=True), output=tmp_path / "wide", format="hf", dtype="float32")))
    assert_mean(wide, parents, SHARES)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("shares", "values", "said"),
    [
        ((0.15, 0.58), {}, r"models.weight: 0.15 \+ 0.58 = 0.73 must be 1; correct them, or set normalize=true"),
        ((1.0, -1.0), {"normalize": True}, r"= 0, by which normalize=true cannot divide"),
        ((0.5, 0.5), {"like": "elsewhere"}, "like=elsewhere must be the path of one of the models"),
        ((1.5, -0.5), {"method": "slerp"}, "two models with weights from 0 to 1"),
        ((0.5, 0.5), {"tp": 2, "format": "hf"}, "a Hugging Face folder has no layout"),
        ((0.5, 0.5), {"pp": 9}, "pp=9 must be at most the number of layers, 4"),
    ],
)
def test_bad_requests_are_refused_by_name(models, tmp_path, shares, values, said):
    with pytest.raises(UserError, match=said):
        merge.run(config(*zip([models / "llama0", models / "llama1"], shares, strict=True), output=tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_part_weights_must_add_up_and_name_parts_that_are_there(models, tmp_path):
    def asked(name: str, **parts: float) -> merge.Config:
        given = [{"path": str(models / f"{name}{seed}"), "weight": 0.5, "parts": parts if seed else {}} for seed in (0, 1)]
        return config(*given, output=tmp_path / "out")

    with pytest.raises(UserError, match=r"models.parts.mlp: 0.5 \+ 0.6 = 1.1 must be 1"):
        asked("llama", mlp=0.6)
    with pytest.raises(
        UserError, match=r"models.parts.mamba is set, but .*llama0 has no mamba; its parts are embeddings, attention, mlp, norms, lm_head"
    ):
        merge.run(asked("llama", mamba=0.5))
    with pytest.raises(UserError, match="has no lm_head, which ties it to the embeddings"):
        merge.run(asked("granite_hybrid", lm_head=0.5))


def test_models_that_differ_are_refused_with_the_first_difference(models, tmp_path):
    good = models / "llama0"
    for changes, said in [
        ({"num_hidden_layers": 3}, "num_layers is 4 and 3; merge models of one shape"),
        ({"rms_norm_eps": 1e-6}, "layernorm_epsilon is 1e-05 and 1e-06"),
        ({"rope_theta": 1e6}, "rotary_base is 500000.0 and 1000000.0; say with `like`"),
    ]:
        other = write_tiny("llama", tmp_path / f"other{len(list(tmp_path.iterdir()))}", **changes)
        with pytest.raises(UserError, match=said):
            merge.run(config((good, 0.5), (other, 0.5), output=tmp_path / "out"))
    with pytest.raises(UserError, match="the family is llama and granitemoehybrid"):
        merge.run(config((good, 0.5), (models / "granite_hybrid0", 0.5), output=tmp_path / "out"))
    with pytest.raises(UserError, match="is given twice"):
        merge.run(config((good, 0.5), (good, 0.5), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    merged = merge.run(config((good, 0.5), (other, 0.5), output=tmp_path / "out", like=other))  # positions alone differ
    assert json.loads((merged / "hf" / "config.json").read_text())["rope_theta"] == 1e6


def test_different_tokenizers_are_refused_and_say_what_differs(models, tmp_path):
    other = write_tiny("llama", tmp_path / "other", seed=1)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=3))  # another spelling of the same tokenizer
    edit_config(other, bos_token_id=0)
    merge.run(config((models / "llama0", 0.5), (other, 0.5), output=tmp_path / "same"))
    content["model"]["vocab"]["w7"], content["model"]["vocab"]["w8"] = 8, 7
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"different tokenizers: the vocabulary differs: 'w7' is 7 and 8 \(digests \w{12} and \w{12}\)"):
        merge.run(config((models / "llama0", 0.5), (other, 0.5), output=tmp_path / "out"))
    path.unlink()
    with pytest.raises(UserError, match="no tokenizer file in common"):
        merge.run(config((models / "llama0", 0.5), (other, 0.5), output=tmp_path / "out"))


def test_half_written_and_damaged_models_are_refused_before_any_work(models, tmp_path):
    checkpoint = imported(models / "llama1", tmp_path / "checkpoint")
    (checkpoint / artifact.COMPLETE).unlink()
    with pytest.raises(UserError, match="has no COMPLETE mark"):
        merge.run(config((models / "llama0", 0.5), (checkpoint, 0.5), output=tmp_path / "out"))
    with pytest.raises(UserError, match="is no folder"):
        merge.run(config((models / "llama0", 0.5), (tmp_path / "nothing", 0.5), output=tmp_path / "out"))
    damaged = write_tiny("llama", tmp_path / "damaged", seed=3)
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="is truncated"):
        merge.run(config((models / "llama0", 0.5), (damaged, 0.5), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_killed_merge_is_never_read_and_is_made_again(models, tmp_path, monkeypatch):
    cfg = config((models / "llama0", 0.5), (models / "llama1", 0.5), output=tmp_path / "out")
    finish = sharded._Writer.finish

    def killed(self: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded._Writer, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        merge.run(cfg)
    with pytest.raises(UserError, match="COMPLETE"):
        run_folder.resolve(tmp_path / "out")
    monkeypatch.setattr(sharded._Writer, "finish", finish)
    assert_mean(weights_of(merge.run(cfg)), [weights_of(models / f"llama{seed}") for seed in (0, 1)], (0.5, 0.5))


def test_by_the_command_line_with_a_dry_run_that_loads_no_torch(models, tmp_path):
    listed = "\n".join(f'[[models]]\npath = "{models}/llama{seed}"\nweight = {share}' for seed, share in enumerate(SHARES))
    (tmp_path / "merge.toml").write_text(f'output = "{tmp_path}/out"\n{listed}\n')
    script = "import sys; from megatron_prism import cli; sys.argv[1:] = {}\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    words = ["merge", str(tmp_path / "merge.toml"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", script.format(words)], capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert "False" in done.stdout and "parameters" in done.stdout and "0.85" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()
    done = prism("merge", tmp_path / "merge.toml")
    assert done.returncode == 0, done.stderr
    assert "merged 2 models" in done.stdout and "merging: " in done.stdout
    assert math.isclose(len(artifact.require(tmp_path / "out", "checkpoint")["merged"]), 2)
