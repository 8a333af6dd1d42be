"""Small runs of two ranks of which some cannot go on: what each rank was told."""

import json
import shutil
from pathlib import Path
from typing import Any

from multirank import run_ranks
from training import from_random, recipe

from megatron_prism.engine import run_folder

SCRIPT = Path(__file__).parent / "laws" / "refusal_ranks.py"
STEPS, SAVED, HALFWAY = 6, 2, 4
KEPT = ("loss", "grad_norm", "lr", "tokens")


def write_cases(root: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> Path:
    """The JSON file of some cases: {name: {"fault": ..., "output": ..., "key": value, ...}}, each a run in FOLDER/NAME."""
    folder.mkdir(exist_ok=True)
    common = recipe(root, folder, steps=STEPS, checkpoint__save_interval=SAVED, checkpoint__keep_last=10, hidden_dropout=0.1, **from_random(root))
    plan: dict[str, Any] = {"common": common, "cases": {}}
    for name, case in cases.items():
        settings = {key: value for key, value in case.items() if key not in ("fault", "output")}
        words = [f"output={folder / case.get('output', name)}", *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        plan["cases"][name] = {"set": words, "fault": case.get("fault")}
    path = folder / "cases.json"
    path.write_text(json.dumps(plan))
    return path


def train(root: Path, folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 2) -> dict[str, list[str]]:
    """What each rank was told in each case, all in one launch."""
    run_ranks(SCRIPT, ranks, str(write_cases(root, folder, cases)))
    return {name: [json.loads((folder / f"{name}.{rank}").read_text())["words"] for rank in range(ranks)] for name in cases}


def halfway(run: Path, to: Path) -> Path:
    """The run as it lay on disk after its second checkpoint; that checkpoint."""
    shutil.copytree(run, to)
    (to / "COMPLETE").unlink()
    shutil.rmtree(run_folder.step_folder(to, STEPS))
    return run_folder.step_folder(to, HALFWAY)
