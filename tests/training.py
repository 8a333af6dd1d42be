"""Small training runs for tests: a random LLaMA with odd features, a tiny blend, and one line per run to start and read them."""

import json
from pathlib import Path
from typing import Any

from multirank import run_ranks
from tiny_blend import write_tiny_blend

LAYOUT_RUNS = Path(__file__).parent / "laws" / "layout_runs.py"
VOCAB_SIZE = 97
"""Odd, so that tensor parallelism pads it."""

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "torch_dtype": "float32",
}


def write_model_files(folder: Path, **changes: Any) -> Path:
    """A config.json and something that stands for its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **changes}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def recipe(root: Path, output: Path, **settings: Any) -> list[str]:
    """Overrides of a tiny fp32 run over the tiny blend in `root/data`; settings: `optimizer__lr=1e-2` is `optimizer.lr=0.01`."""
    if not (root / "data").exists():
        write_tiny_blend(root / "data", VOCAB_SIZE)
    values: dict[str, Any] = {
        "output": str(output),
        "data.blend": str(root / "data" / "blend.toml"),
        "data.seq_len": 32,
        "data.mask_end_of_document": True,
        "steps": 5,
        "global_batch": 8,
        "micro_batch": 1,
        "precision": "fp32",
        "device": "cpu",
        "optimizer.lr": 0.01,
        "schedule.warmup_steps": 2,
        "log.interval": 1,
    }
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in values.items()]


def from_random(root: Path, **changes: Any) -> dict[str, str]:
    """The settings of a run that starts from random weights of the tiny LLaMA."""
    name = "_".join(["model", *(f"{key}-{value}" for key, value in changes.items())])
    folder = root / name
    if not folder.exists():
        write_model_files(folder, **changes)
    return {"model__hf_config": str(folder), "model__tokenizer": str(folder)}


def run_cases(
    root: Path,
    ranks: int,
    cases: dict[str, dict[str, Any]],
    timeout: float = 1000,
    folder: Path | None = None,
    script: Path = LAYOUT_RUNS,
    **common: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Train each case ({"set": {...}, "fault": name}) in one launch on `ranks` ranks, into FOLDER/NAME; the metrics of each, step by step."""
    folder = folder or root / f"runs_{ranks}_{len(list(root.glob('runs_*')))}"
    folder.mkdir(exist_ok=True)
    plan = {
        "common": recipe(root, folder, **common),
        "cases": {
            name: {
                "set": [f"output={folder / name}", *(f"{key.replace('__', '.')}={value}" for key, value in case.get("set", {}).items())],
                "fault": case.get("fault"),
            }
            for name, case in cases.items()
        },
    }
    (folder / "cases.json").write_text(json.dumps(plan))
    run_ranks(script, ranks, str(folder / "cases.json"), timeout=timeout)
    return {name: metrics(folder / name) for name in cases}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def largest_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Largest relative difference of loss and gradient norm over the steps of two runs."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, expected, strict=True) for key in ("loss", "grad_norm"))


def final_state(run: Path) -> dict[str, Any]:
    """`read_state` of a run's newest checkpoint."""
    from megatron_prism.engine import run_folder

    folder = run_folder.newest(run)
    assert folder is not None
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint (weights, master weights, moments), and the optimizer's own numbers."""
    from megatron.core import dist_checkpointing

    from megatron_prism.engine.sharded import Reader

    reader = Reader(folder / "sharded")
    state: dict[str, Any] = {key: reader.read(key) for key in sorted(reader.keys())}
    groups = dist_checkpointing.load_common_state_dict(str(folder / "sharded"))["optimizer"]["groups"]["optimizer"]["param_groups"]
    return state | {f"group {number}": {key: group[key] for key in ("lr", "weight_decay", "step")} for number, group in enumerate(groups)}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names under which two final states are not identical, bit for bit."""
    import torch

    assert found.keys() == expected.keys()
    same = {name: torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value for name, value in expected.items()}
    return [name for name, equal in same.items() if not equal]
