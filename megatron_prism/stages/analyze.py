"""Analyze: models -> what changed between them, as numbers and pictures. Reads weights alone, in a stream; no model is built.

OUTPUT/analysis.json    every figure
OUTPUT/matrices.csv     a row a matrix and pair
OUTPUT/groups.csv       a row a group and pair: the model, components, parts, layers
OUTPUT/report.html      one page: tables, pictures, the paper's figures beside ours
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism import artifact
from megatron_prism.analysis.recipe import Compared, Config, Plan, check
from megatron_prism.config import as_overrides
from megatron_prism.errors import UserError

if TYPE_CHECKING:
    from megatron_prism.analysis.journal import Journal
    from megatron_prism.analysis.stream import Batch, Job

__all__ = ["Config", "dry_run", "parents", "run"]

SCHEMA_VERSION = 2


def with_models(words: Sequence[str], output: Path | None) -> list[str]:
    """What was written behind `prism analyze`: a recipe and overrides as they are, the paths of models as overrides that name them.

    output: of `--output`. Errors: UserError for models beside a recipe, a model that is given twice, and two outputs.
    """
    overrides = [word for word in words if _is_override(word)]
    paths = [word for word in words if word not in overrides]
    models = [path for path in paths if not path.endswith(".toml")]
    twice = next((word for word in overrides if output is not None and word.startswith("output=")), None)
    if twice is not None:
        raise UserError(f"--output {output} and {twice} both say where to write; give one of them")
    if not models:
        return [*words, *(as_overrides({"output": str(output)}) if output else [])]
    if models != paths:
        raise UserError(f"prism analyze takes a recipe or models, not both; got {', '.join(paths)}")
    names = _names([Path(model) for model in models])
    listed = [{"name": name, "path": model} for name, model in zip(names, models, strict=True)]
    table = {"models": listed, "output": str(output or Path("runs") / "-".join(["analyze", *names]))}
    return [*as_overrides(table), *overrides]


def _is_override(word: str) -> bool:
    """key=value; the path of a model may hold a = too (runs/lr=1e-4), but no key holds a slash."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key and not Path(word).is_dir()


def _names(models: Sequence[Path]) -> list[str]:
    """Of models by their paths: as many last parts of each as tell them apart."""
    parts = [model.resolve().parts[1:] for model in models]
    twice = next((model for place, model in enumerate(models) if parts[place] in parts[:place]), None)
    if twice is not None:
        raise UserError(f"model {twice} is given twice; give different ones")
    depth = next(depth for depth in range(1, 1 + max(map(len, parts))) if len({found[-depth:] for found in parts}) == len(models))
    names = ["-".join(found[-depth:]) for found in parts]
    if len(set(names)) < len(models) or not all(names):
        raise UserError(f"models {', '.join(map(str, models))} have no names that tell them apart; name them in a recipe (models.name)")
    return names


def parents(cfg: Config) -> list[Path]:
    """The finished artifacts that are read: all but Hugging Face folders from elsewhere."""
    return _artifacts(check(cfg))


def dry_run(cfg: Config) -> None:
    """Print what would be compared."""
    plan = check(cfg)
    print(f"{plan.family.hf_type}, {plan.shape.num_layers} layers, {plan.family.num_parameters(plan.shape):,} parameters")
    for name, folder in plan.models:
        print(f"model {name}: {folder}")
    for pair in plan.pairs:
        print(f"update {pair.label}" + (f" (paper: {pair.paper})" if pair.paper else ""))
    for one, other in plan.cosines:
        print(f"cosine of {plan.pairs[one].label} and {plan.pairs[other].label}")


def run(cfg: Config) -> Path:
    """Compare; returns the finished output folder."""
    plan = check(cfg)
    if artifact.is_current(cfg.output, cfg, _artifacts(plan)) and _is_as_read(cfg.output, plan):
        return artifact.left_as_it_is(cfg.output)
    from megatron_prism.analysis import page, stream, table
    from megatron_prism.analysis.journal import Journal

    job = _job(cfg, plan)
    rules = len(stream.Walker(job).entries)  # every name and shape is compared before anything is written
    prints = _fingerprints(plan)  # before the weights: a model that is changed meanwhile is read again by the next call
    artifact.begin(cfg.output, "analyze", cfg, _artifacts(plan))
    journal, started = Journal(cfg.output, job, prints), time.perf_counter()
    batches, nbytes = _measure(job, cfg.workers, rules, journal)
    seconds = time.perf_counter() - started
    results = _results(cfg, plan, prints, batches)
    artifact.write_atomic(cfg.output / "analysis.json", json.dumps(results, indent=1) + "\n")
    artifact.write_atomic(cfg.output / "matrices.csv", table.matrices_csv(results))
    artifact.write_atomic(cfg.output / "groups.csv", table.groups_csv(results))
    artifact.write_atomic(cfg.output / "report.html", page.page(results))
    artifact.annotate(cfg.output, seconds=round(seconds, 1), bytes_read=nbytes)
    artifact.complete(cfg.output)
    journal.remove()
    table.show(results)
    print(f"compared {len(plan.models)} models -> {cfg.output / 'report.html'}: {nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    return cfg.output


def _measure(job: "Job", workers: int, rules: int, journal: "Journal") -> tuple[list["Batch"], int]:
    """Every rule, those that the journal has left out; and the bytes that were read for it."""
    from megatron_prism.analysis import stream
    from megatron_prism.evals.progress import progress

    before = sum(batch.nbytes for batch in journal.found.values())
    with progress() as watch:
        advance = watch("comparing", rules, len(journal.found))

        def measured(rule: int, batch: "Batch") -> None:
            journal.add(rule, batch)
            advance(1)

        batches = stream.walk(job, workers, measured, journal.found)
    return batches, sum(batch.nbytes for batch in batches) - before


def _artifacts(plan: Plan) -> list[Path]:
    return [folder for _, folder in plan.models if artifact.is_complete(folder)]


def _fingerprints(plan: Plan) -> list[str]:
    from megatron_prism.evals.models import fingerprint

    return [fingerprint(folder) for _, folder in plan.models]


def _is_as_read(output: Path, plan: Plan) -> bool:
    """Whether the models are those that a finished analysis has read: a Hugging Face folder is no parent, whose digest would tell."""
    read = json.loads((output / "analysis.json").read_text(encoding="utf-8"))["models"]
    return [model["fingerprint"] for model in read] == _fingerprints(plan)


def _job(cfg: Config, plan: Plan) -> "Job":
    from megatron_prism.analysis.stream import Job

    names, folders = zip(*plan.models, strict=True)
    pairs = tuple((pair.start, pair.end) for pair in plan.pairs)
    ranked = frozenset(place for place, pair in enumerate(plan.pairs) if pair.step is None)
    return Job(names, folders, pairs, tuple(plan.cosines), ranked, cfg.rank)


def _results(cfg: Config, plan: Plan, prints: list[str], batches: list["Batch"]) -> dict[str, Any]:
    """The content of analysis.json."""
    updates = [_update(plan, place, batches) for place in range(len(plan.pairs))]
    types = [sum((batch.elements[place] for batch in batches), Counter[str]()) for place in range(len(plan.models))]
    return {
        "schema_version": SCHEMA_VERSION,
        "family": plan.family.hf_type,
        "parameters": plan.family.num_parameters(plan.shape),
        "models": [
            {"name": name, "path": str(folder), "fingerprint": digest, "read_as": dict(kinds.most_common())}
            for (name, folder), digest, kinds in zip(plan.models, prints, types, strict=True)
        ],
        "pairs": [update for update, pair in zip(updates, plan.pairs, strict=True) if pair.step is None],
        "cosines": [_cosine(plan, place, batches) for place in range(len(plan.cosines))],
        "series": _series(cfg, plan, updates),
    }


def _update(plan: Plan, place: int, batches: list["Batch"]) -> dict[str, Any]:
    from megatron_prism.analysis import figures

    pair = plan.pairs[place]
    found = [
        figures.Updated(one.matrix, update.slices, update.stable_rank, update.effective_rank)
        for batch in batches
        for one in batch.measured
        for update in [one.updates[place]]
    ]
    rows = {"groups": figures.of_groups(found)}
    if pair.step is None:
        rows["matrices"] = [figures.of_matrix(one) for one in found]
    start, end = plan.models[pair.start][0], plan.models[pair.end][0]
    return {"label": pair.label, "start": start, "end": end, "step": pair.step, "paper": figures.paper(pair.paper), **rows}


def _cosine(plan: Plan, place: int, batches: list["Batch"]) -> dict[str, Any]:
    from megatron_prism.analysis import figures

    one, other = (plan.pairs[pair].label for pair in plan.cosines[place])
    measured = [(found.matrix, found.cosines[place]) for batch in batches for found in batch.measured]
    return {"one": one, "other": other, "groups": figures.cosines(measured)}


def _series(cfg: Config, plan: Plan, updates: list[dict[str, Any]]) -> dict[str, Any] | None:
    from megatron_prism.analysis import trajectory

    course: list[tuple[Compared, dict[str, Any]]] = [(pair, rows) for pair, rows in zip(plan.pairs, updates, strict=True) if pair.step is not None]
    if cfg.series is None:
        return None
    rates = trajectory.read_rates(cfg.series.run)
    steps = [(pair.step or 0, rows["groups"]) for pair, rows in course]
    return {
        "run": str(cfg.series.run),
        "start": plan.models[course[0][0].start][0],
        "note": trajectory.note(rates, steps[-1][0]),
        "steps": trajectory.trajectory(steps, rates),
        "updates": [rows for _, rows in course],
    }
