"""What a run does, in small: an all-reduce between ranks, and a training step through the engine. Each function is one check."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_prism.doctor import Asked, Finding

RANK_SECONDS = 120
"""What the ranks may take in all: less than the check, which names them."""
SKEW_SECONDS = 1.0
STEPS = 2
VOCAB_SIZE, SEQ_LEN = 97, 16
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}


def ranks(asked: Asked) -> list[Finding]:
    """An all-reduce between processes of this machine: its result, its time, and how far apart their clocks are."""
    name = f"all-reduce of {asked.ranks} ranks"
    with TemporaryDirectory(prefix="prism-doctor-") as folder:
        store = Path(folder) / "store"
        command = [sys.executable, "-m", "megatron_prism.doctor.rank", asked.device, str(store), str(asked.ranks)]
        started = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(asked.ranks)]
        end, said = time.monotonic() + RANK_SECONDS, []
        for rank, process in enumerate(started):
            try:
                said.append(process.communicate(timeout=max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                return [Finding("red", name, f"rank {rank} was not done after {RANK_SECONDS} seconds", _fix(asked))]
    for rank, (process, (_, errors)) in enumerate(zip(started, said, strict=True)):
        if process.returncode:
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            return [Finding("red", name, f"rank {rank} ended with status {process.returncode}: {last}", _fix(asked))]
    return _measured(name, json.loads(said[0][0].splitlines()[-1]))


def _fix(asked: Asked) -> str:
    return "NCCL_DEBUG=INFO prism doctor --only ranks" if asked.device == "cuda" else "GLOO_SOCKET_IFNAME=lo prism doctor --only ranks"


def _measured(name: str, found: dict[str, float | str]) -> list[Finding]:
    skew = float(found["clock_seconds"])
    fix = "chronyc makestep  # or systemctl restart systemd-timesyncd"
    return [
        Finding("green", name, f"{found['backend']}, the right sums, {float(found['seconds']) * 1e3:.1f} ms for 4 MiB"),
        Finding(
            "yellow" if skew > SKEW_SECONDS else "green",
            "clocks of the ranks",
            f"at most {skew * 1e3:.1f} ms apart",
            fix if skew > SKEW_SECONDS else "",
        ),
    ]


def step(asked: Asked) -> list[Finding]:
    """A tiny LLaMA trained for two steps by `prism train`'s own code, one rank, checkpoint included."""
    with TemporaryDirectory(prefix="prism-doctor-") as folder:
        root = Path(folder)
        start = time.perf_counter()
        _train(root, asked.device)
        seconds = time.perf_counter() - start
        records = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [float(record["loss"]) for record in records if "loss" in record]
    return [judged(losses, seconds)]


def judged(losses: list[float], seconds: float) -> Finding:
    """What the losses of a short run from random weights say: near ln(vocabulary), or something computes wrongly."""
    shown, expected = ", ".join(f"{loss:.4f}" for loss in losses), math.log(VOCAB_SIZE)
    fix = "make test  # which names the part that computes wrongly; prism doctor --device cpu --only step leaves the GPU out"
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
        return Finding("red", "training step", f"losses {shown or 'none'}: {STEPS} finite ones were expected", fix)
    if abs(losses[0] - expected) > 0.5:
        return Finding("red", "training step", f"loss {shown}: of random weights it is near ln({VOCAB_SIZE}) = {expected:.2f}", fix)
    return Finding("green", "training step", f"loss {shown}, {STEPS} steps and a checkpoint, in {seconds:.1f} s")


def _train(root: Path, device: str) -> None:
    from megatron_prism.config import load_recipe
    from megatron_prism.engine.bench.cases import random_blend
    from megatron_prism.stages import train

    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_LLAMA))
    (model / "tokenizer.json").write_text("{}")
    recipe = {
        "output": root / "run",
        "model.hf_config": model,
        "model.tokenizer": model,
        "data.blend": random_blend(root / "data", VOCAB_SIZE, SEQ_LEN),
        "data.seq_len": SEQ_LEN,
        "steps": STEPS,
        "global_batch": 2,
        "micro_batch": 1,
        "optimizer.lr": 0.001,
        "schedule.warmup_steps": 1,
        "log.interval": 1,
        "device": device,
        "precision": "fp32",
    }
    train.run(
        load_recipe(None, [f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in recipe.items()], train.Config)
    )
