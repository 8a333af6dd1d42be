"""CKA: models and texts -> how alike their representations are, layer by layer. In one process, or under torchrun on ranks that share each model.

OUTPUT/cka.json         every figure, unrounded
OUTPUT/cka.csv          a row a pair, set and layer
OUTPUT/cka.html         one page: tables, curves, maps, the paper's figures beside ours
OUTPUT/states/          mean hidden states, an array a model and set: what a run that was stopped has computed is not computed again
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prism import artifact
from megatron_prism.analysis.cka_recipe import Config, Plan, check, depth

if TYPE_CHECKING:
    from megatron_prism.analysis.cka_run import Work

__all__ = ["Config", "dry_run", "parents", "run"]


def parents(cfg: Config) -> list[Path]:
    """The finished artifacts that are read: all but Hugging Face folders from elsewhere."""
    return _artifacts(check(cfg))


def dry_run(cfg: Config) -> None:
    """Print what would be compared, on what."""
    from megatron_prism.analysis.cka_inputs import read_sets

    plan = check(cfg)
    for (name, folder), shape in zip(plan.models, plan.shapes, strict=True):
        print(f"model {name}: {folder} ({shape.family}, {depth(shape)} layers, width {shape.hidden_size})")
    for texts in read_sets(cfg):
        print(f"set {texts.name}: {len(texts.texts)} of {texts.found} texts; {texts.origin}")
    for pair in plan.pairs:
        print(f"pair {pair.label}" + (f" (paper: {pair.paper})" if pair.paper else ""))


def run(cfg: Config) -> Path:
    """Compare, on every rank of the launch; returns the output folder, which rank 0 finishes."""
    from megatron_prism.evals.models import fingerprint

    plan = check(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    prints = [fingerprint(folder) for _, folder in plan.models]  # before the weights: a model that changes meanwhile is read again by the next call
    if artifact.is_current(cfg.output, cfg, _artifacts(plan)) and _is_as_read(cfg.output, prints):
        return artifact.left_as_it_is(cfg.output)
    from megatron_prism.engine import device, parallel

    place = device.choose(cfg.device) if cfg.backend == "transformers" else device.setup(cfg.device)
    try:
        parallel.start(place)
        _run(cfg, plan, prints, place.type)
    finally:
        parallel.stop()
    return cfg.output


def _run(cfg: Config, plan: Plan, prints: Sequence[str], device_type: str) -> None:
    from megatron_prism.analysis import cka_run
    from megatron_prism.engine.ranks import on_main
    from megatron_prism.evals.progress import progress

    work = cka_run.prepare(cfg, plan, prints, cfg.precision or ("bf16" if device_type == "cuda" else "fp32"), device_type)
    on_main(lambda: artifact.begin(cfg.output, "cka", cfg, _artifacts(plan)))
    with progress() as watch:
        work.compute(watch)
    if cka_run.is_main():
        _finish(cfg, work)


def _finish(cfg: Config, work: "Work") -> None:
    from megatron_prism.analysis import cka_page

    results = work.results()
    artifact.write_atomic(cfg.output / "cka.json", json.dumps(results, indent=1) + "\n")
    artifact.write_atomic(cfg.output / "cka.csv", cka_page.as_csv(results))
    artifact.write_atomic(cfg.output / "cka.html", cka_page.page(results))
    work.store.leave_only([path for row in work.paths for path in row] if cfg.keep_states else [])
    artifact.complete(cfg.output)
    cka_page.show(results)
    print(f"compared {len(work.plan.models)} models on {len(work.sets)} sets -> {cfg.output / 'cka.html'}")


def _artifacts(plan: Plan) -> list[Path]:
    return [folder for _, folder in plan.models if artifact.is_complete(folder)]


def _is_as_read(output: Path, prints: Sequence[str]) -> bool:
    """Whether the models are those that a finished comparison has read: a Hugging Face folder is no parent, whose digest would tell."""
    read = json.loads((output / "cka.json").read_text(encoding="utf-8"))["models"]
    return [model["fingerprint"] for model in read] == list(prints)
