"""Landscape: a base, its mid-trained model and the one after RL -> scores of the merged models between and around them (arXiv 2603.17074, Eq. 3).

OUTPUT/landscape.json                  every figure
OUTPUT/landscape.html                  one page: the path as curves, the grid as maps
OUTPUT/points/NAME.json                what a point scored, as soon as it is known
OUTPUT/responses/NAME/TASK.jsonl.zst   every response of a point with its verdict
OUTPUT/models/NAME                     with `keep`, the merged models

Runs in one process or on many (RANK, WORLD_SIZE), as `prism evaluate` does: rank 0 merges a point, each rank draws its share of the responses, rank 0
joins, and takes the merged model off the disk. Stopped in any way, it goes on where it was: a point that was scored is not scored again.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism import artifact
from megatron_prism.analysis.landscape import Place
from megatron_prism.analysis.landscape_recipe import Config, Plan, apart_from, check, scorer_code
from megatron_prism.config import config_hash
from megatron_prism.errors import UserError
from megatron_prism.evals.ranks import Ranks

if TYPE_CHECKING:
    from megatron_prism.analysis.landscape_points import Models
    from megatron_prism.evals.evaluation import Evaluation
    from megatron_prism.evals.progress import Watch

__all__ = ["Config", "dry_run", "parents", "run"]

SCHEMA_VERSION = 1
Scores = dict[str, dict[str, float | None] | None]
"""figure -> value and standard error; None where the value is no finite number"""


def parents(cfg: Config) -> list[Path]:
    """The finished artifacts that are read: models, and the blend's prep output."""
    blend = [cfg.perplexity.blend if cfg.perplexity.blend.is_dir() else cfg.perplexity.blend.parent] if cfg.perplexity else []
    return [path for path in [*check(cfg).folders.values(), *blend] if artifact.is_complete(path)]


def dry_run(cfg: Config) -> None:
    """Print which points would be scored, by what, and what one takes on the disk."""
    plan = check(cfg)
    for name, folder in plan.folders.items():
        print(f"{name}: {folder}")
    print(f"{len(cfg.places)} points: {len(cfg.path_places)} on the path, {sum(map(len, cfg.grid_places))} on the grid")
    size = plan.family.num_parameters(plan.shape) * (4 if cfg.point_dtype == "float32" else 2)
    print(
        f"a merged model in {cfg.point_dtype}: about {size / 1e9:.3g} GB"
        + (f", {len(cfg.places)} of them are kept" if cfg.keep else ", one at a time")
    )
    for line in apart_from(cfg, plan):
        print(line)


def run(cfg: Config) -> Path:
    """Score every point, on every rank of the launch; returns the output folder, which rank 0 finishes."""
    plan = check(cfg)
    ranks = Ranks.of_environment(cfg.output, cfg.patience_seconds)
    if artifact.is_current(cfg.output, cfg, parents(cfg)) and _is_as_read(cfg, plan):
        return artifact.left_as_it_is(cfg.output)
    from megatron_prism.evals.frames import named_disk_full
    from megatron_prism.evals.responses import reopen_shares

    reopen_shares(cfg.output, ranks.rank)
    for left in cfg.output.glob(f"parts/*/left.{ranks.rank}"):
        left.unlink(missing_ok=True)
    with named_disk_full(cfg.output), ranks.together(), _scoring(cfg, plan, ranks) as walk:
        if ranks.is_main:
            artifact.begin(cfg.output, "landscape", cfg, parents(cfg))
        else:
            ranks.wait("the start", lambda: [] if artifact.begun_as(cfg.output) == config_hash(cfg) else [0])
        walk.all()
        if ranks.is_main:
            _finish(cfg, plan, walk)
    return cfg.output


@contextmanager
def _scoring(cfg: Config, plan: Plan, ranks: Ranks) -> Iterator["Walk"]:
    """Models, questions, held-out text and graders, open and checked; nothing is written yet."""
    from megatron_prism.analysis.landscape_points import Models
    from megatron_prism.evals.progress import progress
    from megatron_prism.stages.evaluate import open_evaluation, torch_threads

    models = Models(plan.folders, cfg.like)  # every name and shape is compared before anything is written
    asked = cfg.evaluation("any", plan.folders["base"])
    if asked is None:
        with torch_threads(cfg.threads), progress() as watch:
            yield Walk(cfg, plan, ranks, models, None, watch)
        return
    with open_evaluation(asked, ranks) as evaluation:
        yield Walk(cfg, plan, ranks, models, replace(evaluation, watch=_unwatched), evaluation.watch)


def _unwatched(label: str, total: int, done: int) -> Any:
    """A point's own tasks have no bars: the points have one."""
    return lambda count: None


@dataclass
class Walk:
    """From point to point, on one rank. evaluation: None where a function of the recipe's own is all that scores."""

    cfg: Config
    plan: Plan
    ranks: Ranks
    models: "Models"
    evaluation: "Evaluation | None"
    watch: "Watch"

    def __post_init__(self) -> None:
        from megatron_prism.evals.models import fingerprint

        self.fingerprints = {name: fingerprint(folder) for name, folder in self.plan.folders.items()}
        self.asked_as = _asked_as(self.cfg, self.plan)
        self.made_as = [self.fingerprints, self.cfg.like, self.cfg.point_dtype]
        self.scored_as = _digest([self.made_as, self.asked_as, _read_by(self.evaluation)])

    def all(self) -> None:
        """Every point that was not scored yet. Errors: UserError for weights that are not finite, and as scoring refuses."""
        todo = [place for place in self.cfg.places if self.scores(place) is None]
        if self.ranks.is_main:
            self._clear()
            if todo:
                self.models.check_finite(self.watch("reading the models", len(self.plan.folders) * len(self.models.rules), 0))
        advance = self.watch("points", len(self.cfg.places), len(self.cfg.places) - len(todo))
        for place in todo:
            if self.ranks.is_main:
                self._score(place)
                advance(1)
            elif self.evaluation is not None:
                self._help(place)

    def scores(self, place: Place) -> Scores | None:
        """What a point scored, if it was made and asked as it would be now, and is kept where it shall be."""
        path = self._record(place)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        is_there = self._kept(place).is_dir() or not self.cfg.keep
        return found["scores"] if is_there and found.get("scored_as") == _digest([self.scored_as, place]) else None

    def _score(self, place: Place) -> None:
        """Rank 0: merge, score with the others' help, write down, remove."""
        from megatron_prism.analysis.landscape_points import remove

        model, scores = self._model(place), Scores()
        self.models.write(place, model, self.cfg.point_dtype)
        if self.evaluation is not None:
            scores |= _figures(self._evaluated(place, model) or {})
            others = range(1, self.ranks.world)
            self.ranks.wait(f"point {place.name}", lambda: [rank for rank in others if not self._left(place, rank).is_file()])
        if self.plan.scorer is not None:
            scores |= _own(self.plan.scorer(model), self.cfg.scorer or "", place)
        record = {**place._asdict(), "scored_as": _digest([self.scored_as, place]), "scores": scores}
        kept = self._kept(place)
        remove(kept)  # of other models, where it is there
        if self.cfg.keep:
            kept.parent.mkdir(exist_ok=True)
            model.rename(kept)
        artifact.write_atomic(self._record(place), json.dumps(record, indent=1) + "\n")
        remove(model)
        shutil.rmtree(self._parts(place), ignore_errors=True)

    def _help(self, place: Place) -> None:
        """Another rank: its share of a point's responses."""
        model = self._model(place)
        self.ranks.wait(f"the merged model of {place.name}", lambda: [] if model.is_dir() or self.scores(place) is not None else [0])
        if self.scores(place) is None:
            self._evaluated(place, model)
            self._left(place, self.ranks.rank).touch()

    def _evaluated(self, place: Place, model: Path) -> dict[str, Any] | None:
        """As `prism evaluate` scores a model; None on other ranks than 0."""
        from megatron_prism.evals.evaluation import ModelRun

        assert self.evaluation is not None
        request = self.cfg.evaluation(place.name, model)
        assert request is not None
        one = ModelRun(replace(self.evaluation, cfg=request), request.models[0], {})
        if self.ranks.is_main:
            one.drop_other_responses()
        return one.score()

    def _clear(self) -> None:
        """Merged models that a killed session left, but for the one that is taken up again."""
        due = next((place for place in self.cfg.places if self.scores(place) is None), None)
        kept = self._model(due) if due is not None else None
        for folder in self.cfg.output.glob("parts/*/*model_*"):
            if folder != kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _record(self, place: Place) -> Path:
        return self.cfg.output / "points" / f"{place.name}.json"

    def _kept(self, place: Place) -> Path:
        return self.cfg.output / "models" / place.name

    def _parts(self, place: Place) -> Path:
        return self.cfg.output / "parts" / place.name

    def _left(self, place: Place, rank: int) -> Path:
        """Says that a rank is done with a point's merged model."""
        return self._parts(place) / f"left.{rank}"

    def _model(self, place: Place) -> Path:
        """Named by what it is made of: what another session left is whole, and the same."""
        return self._parts(place) / f"model_{_digest([self.made_as, place])[:12]}"


def _asked_as(cfg: Config, plan: Plan) -> str:
    """Digest of how a point is scored, as far as the recipe and the files that it names tell; `_read_by` is the rest."""
    from megatron_prism.evals.evaluation import protocol
    from megatron_prism.evals.recipe import sampling_of, tasks_of

    request = cfg.evaluation("any", plan.folders["base"])
    tasks = (
        [[task.model_dump(mode="json"), protocol(request, "", task), sampling_of(request, task).n] for task in tasks_of(request)] if request else []
    )
    return _digest([tasks, cfg.generation.dtype, cfg.scorer, scorer_code(cfg.scorer)])


def _read_by(evaluation: "Evaluation | None") -> list[Any]:
    """What is read by every point: questions with their answers, held-out text."""
    from megatron_prism.evals.responses import asked, graded_as

    if evaluation is None:
        return []
    questions = [[task.name, [[each.id, asked(each), graded_as(each)] for each in selection.questions]] for task, selection in evaluation.tasks]
    return [questions, [[part.source, part.domain, part.digest] for part in evaluation.held_out]]


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _figures(found: Mapping[str, Any]) -> Scores:
    """Of a model's scores: accuracy with its standard error, loss by domain."""
    scores: Scores = {f"accuracy/{task}": _figure(one["accuracy"], one["standard_error"]) for task, one in found.get("tasks", {}).items()}
    return scores | {f"loss/{domain}": _figure(one["loss"]) for domain, one in found.get("perplexity", {}).get("domains", {}).items()}


def _own(found: Mapping[str, float], scorer: str, place: Place) -> Scores:
    """Of the recipe's own function. Errors: UserError for what are no named numbers."""
    try:
        numbers = {name: value.__float__() for name, value in found.items()}  # float() would read a text as one
    except (AttributeError, TypeError, ValueError, RuntimeError):  # no mapping; no number; an array or a tensor of several
        numbers = {}
    if not numbers:
        raise UserError(
            f"scorer={scorer} gave {found!r} at alpha={place.alpha}, beta={place.beta}; it must return names with numbers: {{'rhymes': 0.5}}"
        )
    return {f"scorer/{name}": _figure(value) for name, value in numbers.items()}


def _figure(value: float, error: float | None = None) -> dict[str, float | None] | None:
    return {"value": value, "error": error} if math.isfinite(value) else None


def _is_as_read(cfg: Config, plan: Plan) -> bool:
    """Whether models, tasks and scorer are those of a finished landscape: foreign folders and files are no parents, whose digests would tell."""
    from megatron_prism.evals.models import fingerprint

    found = json.loads((cfg.output / "landscape.json").read_text(encoding="utf-8"))
    models = [model["fingerprint"] for model in found["models"]]
    return models == [fingerprint(folder) for folder in plan.folders.values()] and found.get("asked_as") == _asked_as(cfg, plan)


def _finish(cfg: Config, plan: Plan, walk: Walk) -> None:
    """Rank 0: all points are scored; what people read."""
    from megatron_prism.analysis import landscape_page, landscape_table

    results = _results(cfg, plan, walk)
    artifact.write_atomic(cfg.output / "landscape.json", json.dumps(results, indent=1) + "\n")
    artifact.write_atomic(cfg.output / "landscape.html", landscape_page.page(results))
    shutil.rmtree(cfg.output / "parts", ignore_errors=True)
    artifact.complete(cfg.output)
    landscape_table.show(results)
    print(f"scored {len(results['points'])} points -> {cfg.output / 'landscape.html'}")


def _results(cfg: Config, plan: Plan, walk: Walk) -> dict[str, Any]:
    """The content of landscape.json."""
    places = cfg.places
    scored = [(place, found) for place in places if (found := walk.scores(place)) is not None]
    assert len(scored) == len(places), "every point is scored"
    names = list(dict.fromkeys(name for _, scores in scored for name in scores))
    return {
        "schema_version": SCHEMA_VERSION,
        "dtype": cfg.point_dtype,
        "like": cfg.like,
        "asked_as": walk.asked_as,
        "models": [{"name": name, "path": str(folder), "fingerprint": walk.fingerprints[name]} for name, folder in plan.folders.items()],
        "figures": [_described(name) for name in names],
        "points": [{**place._asdict(), "weights": list(place.weights[: len(plan.folders)]), "scores": scores} for place, scores in scored],
        "path": [{"position": position, "point": places.index(place)} for position, place in cfg.path_places.items()] or None,
        "grid": {"alpha": cfg.grid.alpha, "beta": cfg.grid.beta, "points": [[places.index(place) for place in row] for row in cfg.grid_places]}
        if cfg.grid
        else None,
        "notes": apart_from(cfg, plan),
    }


def _described(name: str) -> dict[str, Any]:
    kind, _, of = name.partition("/")
    label, factor = {"accuracy": (f"accuracy on {of}, %", 100), "loss": (f"loss on {of}, nats a token", 1)}.get(kind, (of, 1))
    return {"name": name, "label": label, "factor": factor}
