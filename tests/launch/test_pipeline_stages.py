"""`prism run` over the real stages: text to a trained Hugging Face model, on two ranks, then nothing left to do."""

import json
import shutil
from pathlib import Path

from prism_command import prism
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_prism import artifact

PIPELINE = """
output = "runs"

[[stage]]
name = "prep"
recipe = "prep.toml"

[[stage]]
name = "train"
ranks = 2
recipe = "train.toml"
set = { data.blend = "stage:prep", model.tokenizer = "stage:prep/tokenizer", parallel.tp = 2 }

[[stage]]
name = "export"
stage = "convert"
set = { direction = "export", source = "stage:train" }
"""

PREP = """
tokenizer = "tokenizer"
validation_fraction = 0.2
workers = 1

[[source]]
name = "lines"
paths = ["text.jsonl"]
"""

TRAIN = """
steps = 3
global_batch = 4
precision = "fp32"
device = "cpu"

[model]
hf_config = "model"

[data]
seq_len = 32

[optimizer]
lr = 1e-3
"""

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def _write_project(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "tokenizer")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(MODEL))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {number} counts to {number + 1}. " * 3}) + "\n" for number in range(60)))
    for name, text in (("pipeline.toml", PIPELINE), ("prep.toml", PREP), ("train.toml", TRAIN)):
        (folder / name).write_text(text)


def test_real_stages_run_once_and_are_skipped_then(tmp_path: Path) -> None:
    _write_project(tmp_path)
    first = prism("run", "pipeline.toml", cwd=tmp_path, timeout=240)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 run, 0 skipped" in first.stdout
    provenance = artifact.require(tmp_path / "runs/train")
    assert provenance["host"]["ranks"] == 2 and artifact.digest(tmp_path / "runs/prep") in provenance["parents"].values()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/export")
    assert model.config.vocab_size == 257

    second = prism("run", "pipeline.toml", cwd=tmp_path, timeout=60)
    assert second.returncode == 0 and "0 run, 3 skipped" in second.stdout, second.stdout + second.stderr

    shutil.rmtree(tmp_path / "runs/export")
    third = prism("run", "pipeline.toml", cwd=tmp_path, timeout=120)
    assert third.returncode == 0 and "1 run, 2 skipped" in third.stdout, third.stdout + third.stderr
