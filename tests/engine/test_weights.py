"""Import and export are strict on both sides, stream in bounded memory, and read Megatron-LM's own checkpoints and GGUF files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_llama

from megatron_prism import artifact, families
from megatron_prism.config import Block
from megatron_prism.engine import gguf_file, run_folder, sharded, verify, weights
from megatron_prism.engine.sharded import Piece, Reader, write_streaming
from megatron_prism.errors import UserError


class Nothing(Block):
    """The config of a folder made by a test."""


def imported(folder: Path, source: Path, **options) -> Path:
    artifact.begin(folder, "checkpoint", Nothing())
    weights.import_hf(source, folder, **options)
    artifact.complete(folder)
    return folder


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def source(tmp_path):
    return write_llama(tmp_path / "hf")


# --- strictness --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), r"lacks model\.layers\.2\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)}), r"holds model\.layers\.0\.extra\.weight, which no rule"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), r"q_proj\.bias, which no rule"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"model\.norm\.weight has shape \[33\], but config\.json says \[32\]"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:130].clone()}), r"lm_head\.weight has shape \[130, 32\]"),
    ],
)
def test_a_source_that_does_not_fit_its_config_is_refused_by_name(source, tmp_path, change, named):
    change_tensors(source, change)
    with pytest.raises(UserError, match=named):
        weights.import_hf(source, tmp_path / "out")
    assert not sharded.is_sharded(tmp_path / "out" / "sharded")


def test_a_tied_config_over_untied_weights_is_refused(source, tmp_path):
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        weights.import_hf(source, tmp_path / "out")


def test_layers_of_unlike_types_are_refused_unless_a_type_is_chosen(source, tmp_path):
    change_tensors(source, lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(32, dtype=torch.float16)}))
    with pytest.raises(UserError, match="layer_norm_weight must have one type"):
        weights.import_hf(source, tmp_path / "out")
    weights.import_hf(source, tmp_path / "out", dtype="float32")
    assert sharded.is_sharded(tmp_path / "out" / "sharded")


def test_an_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="int8"):
        weights.import_hf(source, tmp_path / "out", dtype="int8")


def test_an_unfinished_checkpoint_is_not_exported(source, tmp_path):
    checkpoint = imported(tmp_path / "checkpoint", source)
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(UserError, match="COMPLETE"):
        weights.export_hf(checkpoint, tmp_path / "out")


def test_a_checkpoint_that_lacks_or_misshapes_a_tensor_is_not_exported(source, tmp_path):
    checkpoint = imported(tmp_path / "checkpoint", source)
    edit_config(checkpoint / "hf", intermediate_size=40)
    artifact.complete(checkpoint)
    with pytest.raises(UserError, match=r"linear_fc1\.weight has shape \[4, 96, 32\], but config\.json says \[4, 80, 32\]"):
        weights.export_hf(checkpoint, tmp_path / "out")
    edit_config(checkpoint / "hf", intermediate_size=48, attention_bias=True, mlp_bias=True)
    artifact.complete(checkpoint)
    with pytest.raises(UserError, match=r"lacks decoder\.layers\.mlp\.linear_fc1\.bias"):
        weights.export_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_export_that_fails_leaves_nothing_that_loads(source, tmp_path, monkeypatch):
    checkpoint = imported(tmp_path / "checkpoint", source)
    weights.export_hf(checkpoint, tmp_path / "out")

    def failing(names, family, model):
        raise OSError("disk full")
        yield

    monkeypatch.setattr(weights, "_hf_tensors", failing)
    with pytest.raises(OSError, match="disk full"):
        weights.export_hf(checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        families.load(tmp_path / "out")


# --- types -------------------------------------------------------------------------------------------------------------------------------------


def test_an_export_in_another_type_says_so_in_its_config(source, tmp_path):
    checkpoint = imported(tmp_path / "checkpoint", source)
    out = weights.export_hf(checkpoint, tmp_path / "out", "bfloat16")
    wanted = load_file(source / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_without_a_record_of_types_takes_the_declared_one(source, tmp_path):
    checkpoint = imported(tmp_path / "checkpoint", source)
    (checkpoint / "hf" / "weights.json").unlink()
    edit_config(checkpoint / "hf", dtype="bfloat16")
    artifact.complete(checkpoint)
    out = weights.export_hf(checkpoint, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_the_newest_complete_step_of_a_run_is_exported(source, tmp_path):
    for step in (1, 2, 3):
        folder = imported(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", source)
    (folder / "COMPLETE").unlink()
    assert run_folder.resolve(tmp_path / "run").name == "step_00000002"
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="without a complete checkpoint"):
        run_folder.resolve(tmp_path / "run")


def test_a_bf16_run_is_exported_from_its_fp32_masters(tmp_path):
    from training import from_random, recipe

    from megatron_prism.config import load_recipe
    from megatron_prism.engine import loop, parallel
    from megatron_prism.engine.recipe import TrainConfig

    settings = {"precision": "bf16", "steps": 2, **from_random(tmp_path, tie_word_embeddings=False)}
    run = loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "run", **settings), TrainConfig))
    parallel.stop()
    stored = Reader(run_folder.resolve(run) / "sharded")
    out = weights.export_hf(run, tmp_path / "out")  # config.json declares float32
    head = load_file(out / "model.safetensors")["lm_head.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    assert torch.equal(head.bfloat16(), stored.read("output_layer.weight")[: len(head)])
    short = load_file(weights.export_hf(run, tmp_path / "short", "bfloat16") / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor.bfloat16(), short[name]), name
    for folder, dtype in ((out, None), (tmp_path / "short", "bfloat16")):
        assert verify.verify(run_folder.resolve(run), folder, weights.compared_dtype(run_folder.resolve(run), dtype)).relative < 1e-5


# --- Megatron-LM checkpoints -------------------------------------------------------------------------------------------------------------------


def megatron_lm_checkpoint(folder: Path, checkpoint: Path, numbered: bool) -> Path:
    """As Megatron-LM writes one: an iteration folder, a padded vocabulary, optimizer tensors and other extras beside the model."""
    reader = Reader(checkpoint / "sharded")

    def pieces():
        for key in reader:
            tensor = reader.read(key)
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                tensor = torch.cat([tensor, torch.full((13, tensor.shape[1]), 7.0)])
            if numbered and key.startswith("decoder.layers."):
                for layer, part in enumerate(tensor):
                    yield Piece(key.replace("layers.", f"layers.{layer}."), [part])
            else:
                yield Piece(key, [tensor])
        yield Piece("optimizer.state.exp_avg.decoder.final_layernorm.weight", [torch.zeros(3)])
        yield sharded.EmptyObject("rng_state", (0, 1))

    write_streaming(folder / "iter_0000100", pieces())
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


@pytest.mark.parametrize("numbered", [False, True], ids=["stacked_layers", "numbered_layers"])
def test_a_megatron_lm_checkpoint_imports_with_a_padded_vocabulary(source, tmp_path, numbered):
    foreign = megatron_lm_checkpoint(tmp_path / "foreign", imported(tmp_path / "a", source), numbered)
    for place in (foreign, foreign / "iter_0000100"):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        checkpoint = imported(tmp_path / "b", place, like=source, tp=2)
        assert Reader(checkpoint / "sharded").shape("output_layer.weight") == (131, 32)
        out = weights.export_hf(checkpoint, tmp_path / "out")
        wanted = load_file(source / "model.safetensors")
        found = load_file(out / "model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_megatron_lm_checkpoints_that_cannot_be_read_are_refused_by_name(source, tmp_path):
    foreign = megatron_lm_checkpoint(tmp_path / "foreign", imported(tmp_path / "a", source), False)
    with pytest.raises(UserError, match="--like"):
        weights.import_hf(foreign, tmp_path / "out")
    (foreign / "latest_checkpointed_iteration.txt").write_text("200")
    with pytest.raises(UserError, match="iter_0000200"):
        weights.import_hf(foreign, tmp_path / "out", like=source)
    (foreign / "iter_0000200" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(UserError, match="old format"):
        weights.import_hf(foreign, tmp_path / "out", like=source)


# --- GGUF --------------------------------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, source: Path) -> None:
    """The tiny model as llama.cpp stores one: its names, its order of query and key rows, unquantised."""
    import gguf
    import numpy as np

    _, model = families.load(source)
    writer = gguf.GGUFWriter(path, "llama")
    back = {theirs: ours for ours, theirs in gguf_file.NAMES.items()}
    for name, tensor in load_file(source / "model.safetensors").items():
        head, _, kind = name.removeprefix("model.").rpartition(".")
        layer, values = "", tensor.numpy()
        if head.startswith("layers."):
            _, number, head = head.split(".", 2)
            layer = f"blk.{number}."
        stem = back.get(head) or back[f"model.{head}"]
        heads = {"attn_q": model.num_attention_heads, "attn_k": model.num_query_groups}.get(stem)
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{layer}{stem}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_as_the_model_that_it_was_made_from(source, tmp_path):
    write_gguf(tmp_path / "model.gguf", source)
    out = weights.export_hf(imported(tmp_path / "checkpoint", tmp_path / "model.gguf", like=source), tmp_path / "out")
    wanted, found = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not list((tmp_path / "checkpoint").glob(".gguf*"))


def test_row_order_is_undone_as_transformers_undoes_it():
    import numpy as np
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = np.random.default_rng(0).standard_normal((4 * 10, 6))
    theirs = LlamaTensorProcessor(config={"num_attention_heads": 8, "num_key_value_heads": 4}).process(rows, "blk.0.attn_k.weight").weights
    assert np.array_equal(gguf_file.halves(rows, 4), theirs)


def test_gguf_files_that_cannot_be_read_are_refused(source, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense, and more of it")
    with pytest.raises(UserError, match=r"x\.gguf is truncated or no GGUF file"):
        weights.import_hf(tmp_path / "x.gguf", tmp_path / "out", like=source)
    with pytest.raises(UserError, match=r"nothing\.gguf does not exist"):
        weights.import_hf(tmp_path / "nothing.gguf", tmp_path / "out", like=source)


# --- memory ------------------------------------------------------------------------------------------------------------------------------------

MEASURE = """
from pathlib import Path
from megatron_prism.engine import weights
def peak():  # of this program alone: getrusage would count the process that started it
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024
before = peak()
{call}
print(peak() - before)
"""


def extra_bytes(call: str) -> int:
    """Growth of a fresh process's peak resident memory over one call."""
    done = subprocess.run([sys.executable, "-c", MEASURE.format(call=call)], capture_output=True, text=True, timeout=200, check=True)
    grown = int(done.stdout.split()[-1])
    print(f"{grown / 1e6:.0f} MB")
    return grown


def test_a_checkpoint_of_tp8_pp4_is_exported_and_imported_in_the_memory_of_one_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = {"model_type": "llama", "vocab_size": 16000, "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu", **sizes}
    family, model = families.find(config), families.find(config).model_config(config)

    def pieces():
        torch.manual_seed(0)
        for entry in family.rules(model):
            place, stage = (None, 0) if entry.layer is None else ((entry.layer, 8), entry.layer * 4 // 8)
            halves = entry.rule.sections([torch.randn(part.shape) for part in entry.rule.parts(model)], model)
            yield Piece(entry.rule.key, halves, place, entry.rule.tp_axis, stage)

    folder = artifact.begin(tmp_path / "big", "checkpoint", Nothing())
    artifact.write_atomic(folder / "hf" / "config.json", json.dumps(config))
    total = write_streaming(folder / "sharded", pieces(), tp=8)
    artifact.complete(folder)
    largest = 16000 * 1024 * 4
    assert total > 400_000_000 and len(list((folder / "sharded").glob("*.distcp"))) == 32
    shard = 100_000_000
    grown = extra_bytes(f"weights.export_hf(Path({str(folder)!r}), Path({str(tmp_path / 'out')!r}), None, {shard})")
    assert grown < 2 * largest  # the tensor, the chunk being read, and small change; the model has 7 times the tensor
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    grown = extra_bytes(f"weights.import_hf(Path({str(tmp_path / 'out')!r}), Path({str(tmp_path / 'back')!r}), tp=2)")
    assert grown < shard + 2 * largest  # a mapped shard counts as resident
