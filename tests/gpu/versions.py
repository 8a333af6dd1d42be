"""One GPU under whatever versions are installed: dense and hybrid, fp32, bf16 and FP8, trained, saved, resumed by another process, beside the CPU.

    python tests/gpu/versions.py FOLDER train     six steps of each case, a checkpoint after the third
    python tests/gpu/versions.py FOLDER resume    the same from the third step on, and whether every bit of the end is equal
    python tests/gpu/versions.py FOLDER cpu       the fp32 cases on the CPU, and how far the GPU's losses are from them

The cases are test_gpu_training's, without a launch for each: where importing takes a minute, launches would take all the time.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from laws import layout_runs  # noqa: E402
from test_gpu_training import ON_GPU, SHAPE, from_hybrid  # noqa: E402
from training import differing, final_state, from_random, metrics, recipe  # noqa: E402

from megatron_prism.engine import checkpoint, run_folder  # noqa: E402

EXACT = {"layers": "transformer_engine", "precision": "bf16", "deterministic": "true"}
KINDS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": EXACT, "tensorwise": {**EXACT, "fp8.recipe": "tensorwise"}}
MODELS = ("dense", "hybrid")


def main() -> None:
    """One part, by name."""
    root, part = Path(sys.argv[1]), sys.argv[2]
    root.mkdir(exist_ok=True)
    {"train": train, "resume": resume, "cpu": cpu}[part](root)


def train(root: Path) -> None:
    """Every case, from one checkpoint of each model."""
    fresh = {"dense": from_random(root, **SHAPE), "hybrid": from_hybrid(root)}
    run(root, "whole", {f"start {name}": {**where, "steps": 1} for name, where in fresh.items()} | cases(root))


def resume(root: Path) -> None:
    """As if each had ended after its third step."""
    for name in cases(root):
        if name.split()[1] != "fp32":
            shutil.copytree(root / "whole" / name, root / "resumed" / name)
            (root / "resumed" / name / "COMPLETE").unlink()
            checkpoint.remove(run_folder.step_folder(root / "resumed" / name, 6))
    exact = {name: settings for name, settings in cases(root).items() if name.split()[1] != "fp32"}
    run(root, "resumed", exact)
    for name in exact:
        wrong = differing(final_state(root / "resumed" / name), final_state(root / "whole" / name))
        print(f"{name}: resumed {'bit for bit' if not wrong else f'APART in {len(wrong)}: {wrong[:4]}'}", flush=True)


def cpu(root: Path) -> None:
    """Losses and norms beside the CPU's: first step, and all."""
    run(root, "cpu", {name: {**settings, "device": "cpu"} for name, settings in cases(root).items() if name.split()[1] == "fp32"})
    for model in MODELS:
        expected = metrics(root / "cpu" / f"{model} fp32")
        for kind in KINDS:
            found = metrics(root / "whole" / f"{model} {kind}")
            apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True)]
            print(f"{model} {kind}: loss apart from the CPU's fp32: first step {apart[0]:.1e}, all {max(apart):.1e}", flush=True)


def cases(root: Path) -> dict[str, dict[str, Any]]:
    """Model and kind -> settings."""
    start = {name: {"model.checkpoint": str(root / "whole" / f"start {name}")} for name in MODELS}
    return {f"{model} {kind}": {**start[model], "steps": 6, **settings} for model in MODELS for kind, settings in KINDS.items()}


def run(root: Path, folder: str, wanted: dict[str, dict[str, Any]]) -> None:
    """Train each in this process, a world of one."""
    saved = {"checkpoint__save_interval": 3, "checkpoint__keep_last": 10}
    plan = {
        "common": recipe(root, root / folder, **ON_GPU, **saved),
        "cases": {
            name: {"set": [f"output={root / folder / name}", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]}
            for name, settings in wanted.items()
        },
    }
    (root / f"{folder}.json").write_text(json.dumps(plan))
    sys.argv[1:] = [str(root / f"{folder}.json")]
    layout_runs.main()


if __name__ == "__main__":
    main()
