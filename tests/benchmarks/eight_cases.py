"""What eight_h200.py runs, most valuable first: the cases of examples/bench/eight_h200.toml, fewer GPUs, law 3, checkpoints; each on any device.

Owns: the order, the tiny stand-ins of a dry run on a CPU (the same layouts, 8 real ranks), which checkpoint the host and the disk of such a machine
hold, and the rows that neighbours publish, each with its convention. No torch.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_prism import families
from megatron_prism.config import load_recipe
from megatron_prism.engine.bench.cases import CaseConfig, Config, planned

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "bench" / "eight_h200.toml"
RANKS = 8
SCALING = "scaling, 8 GPUs"
FEWER = {f"scaling, {gpus} GPU{'s' if gpus > 1 else ''}": gpus for gpus in (1, 2, 4)}
LAWS = {"law 3, dense": "dense", "law 3, hybrid": "hybrid", "law 3, TransformerEngine": "transformer_engine"}
"""name -> group of tests/laws/eight_ranks.py"""
CHECKPOINT = "checkpoint"
CHECKPOINT_PARAMETERS = {"cuda": 2e9, "cpu": 1e7}
"""28 bytes of each on the disk at a time (one checkpoint, and the disk's own measurement or a half-written one), 28 of host memory (the copy in the
background, and the page cache of what is written): 56 GB and 56 GB where a machine has 235 GiB and 560 GiB"""
FIRST = 14
"""cases of the recipe that come before anything else: LLaMA's and the hybrids' bf16 rows"""
BETWEEN = ("law 3, dense", "mistral-small-24b tp=2 bf16", "mistral-small-24b tp=4 bf16", "mistral-small-24b tp=8 bf16", SCALING, CHECKPOINT)

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 8, "head_dim": 8},
    "mistral": {"num_hidden_layers": 8, "head_dim": 8},
    "nemotron_h": {
        "num_hidden_layers": 8, "hybrid_override_pattern": "M-M*-M-*", "attention_head_dim": 8, "head_dim": 8, "mamba_num_heads": 16,
        "mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 16,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mamba", "mamba"], "shared_intermediate_size": 128, "mamba_n_heads": 16,
        "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
}  # fmt: skip
"""model_type -> sizes of a model that eight ranks can cut every way"""
EVERY_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 512}
SHORT = {8192: 128, 131072: 256}
"""tokens of a sequence -> those of a dry run"""

PUBLISHED = {
    "llama-3.1-8b 8k bf16": "torchtitan (b): 6,667 (343)",
    "llama-3.1-8b 8k FP8 tensorwise": "Megatron-Bridge (a): **14,451 (744)**; torchtitan: 8,532 (439) (b), 10,938 (563) (c)",
    "llama-3.1-8b 8k FP8 delayed": "NeMo (d): 12,036 (619)",
    "llama-3.1-8b 128k cp=4 bf16": "torchtitan (e), FP8: 1,071 (159)",
    "llama-3.1-8b 128k cp=4 FP8": "torchtitan (e): **1,071 (159)**",
}
"""case -> rows beside it: tokens/s/GPU, and TFLOP/s/GPU with causal attention, which for all but Megatron-Bridge's is our sum"""
SOURCES = """\
Published: tokens/s/GPU and, in brackets, TFLOP/s/GPU with causal attention: Megatron-Bridge's own, the others' summed here, as they count all keys.
(a) container 25.11, 8 H100, FP8 current scaling, FSDP 8, global batch 128, micro-batch 1. (b) December 2024, 8 H100 of 96 GB, FSDP, 2 sequences a
GPU, torch.compile, selective recomputation, bf16 or float8. (c) June 2025, **H200**, 32 of them, FSDP, 2 sequences a GPU, compile, float8 with float8
all-gather. (d) container 24.07, LLaMA-3-8B, 8 H100, FP8, cp=2, global batch 128; published as 697 TFLOP/s with all keys counted. (e) 8 H100, float8,
cp=4, compile, everything recomputed; 269 TFLOP/s with all keys counted. Nobody publishes this row in bf16 with Megatron-Bridge, nor dense Nemotron-H,
Granite-4-H or Mistral-Small on eight GPUs."""


@dataclass(frozen=True)
class Case:
    """One thing to run. keys: of `prism bench`, for a step that is timed."""

    name: str
    kind: Literal["bench", "law", "checkpoint"]
    ranks: int = RANKS
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> CaseConfig:
        """Of `prism bench`."""
        return CaseConfig.model_validate(self.keys)


def every_case(recipe: Path = RECIPE) -> list[Case]:
    """All of them, most valuable first."""
    found = {name: Case(name, "bench", RANKS, _keys(name, options)) for name, options in load_recipe(recipe, [], Config).each()}
    names = list(found)
    for name, gpus in FEWER.items():
        found[name] = Case(name, "bench", gpus, {**found[SCALING].keys, "name": name})
    found |= {name: Case(name, "law") for name in LAWS} | {CHECKPOINT: Case(CHECKPOINT, "checkpoint")}
    order = dict.fromkeys([*names[:FIRST], *BETWEEN, *reversed(FEWER), *names, *LAWS])
    return [found[name] for name in order]


def _keys(name: str, options: CaseConfig) -> dict[str, Any]:
    return {**options.model_dump(mode="json", exclude_none=True), "name": name}


def on_gpus(case: Case) -> Case:
    """The case, which is refused where there is no GPU: whole models would fill the host."""
    return replace(case, keys={**case.keys, "train": {**case.keys["train"], "device": "cuda"}}) if case.kind == "bench" else case


def tiny(case: Case, folder: Path) -> Case:
    """The same layout for eight CPU processes: a model of some layers in a folder, short sequences, few micro-batches, no FP8."""
    if case.kind != "bench":
        return case
    options = case.options
    _, train, plan = planned(options, case.ranks)
    assert options.model is not None
    keys = {**options.train, "device": "cpu", "data": {"seq_len": SHORT[train.data.seq_len]}}
    for key in ("fp8", "global_batch"):
        keys.pop(key, None)
    if train.parallel.cp_comm_type is not None:  # our own layers gather
        keys["parallel"] = {key: value for key, value in keys["parallel"].items() if key != "cp_comm_type"}
    if train.recompute_layers is not None:
        keys["recompute_layers"] = 4
    own = {"model": str(_tiny_model(options.model, folder)), "train": keys, "steps": 2, "micro_batches": min(plan.num_microbatches, 2 * plan.pp)}
    return replace(case, keys={**case.keys, **own})


def _tiny_model(name: str, folder: Path) -> Path:
    config = families.published(name)
    changed = {**config, **EVERY_TINY, **TINY[config["model_type"]], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return place
