"""A checked recipe -> hidden states of every model on every set -> the figures of cka.json.

Owns: what is computed and what is there already (rank 0 looks and writes; its errors are everyone's), putting figures together.
One model is in memory at a time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_prism.analysis import cka
from megatron_prism.analysis.cka_inputs import TextSet, Tokens, read_sets, read_tokens
from megatron_prism.analysis.cka_recipe import Compared, Config, Plan, depth, paper
from megatron_prism.analysis.hidden_states import Backend, Precision, Store, check_finite, open_transformers
from megatron_prism.engine import run_folder
from megatron_prism.engine.ranks import on_main
from megatron_prism.evals.progress import Watch

SCHEMA_VERSION = 1
LAST_POINT = "after the final norm"
NO_SPREAD = "all inputs, or all of a draw, have one and the same state"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is to be done. tokens, paths: by model, then by set."""

    cfg: Config
    plan: Plan
    precision: Precision
    fingerprints: Sequence[str]
    sets: Sequence[TextSet]
    tokens: Sequence[Sequence[Tokens]]
    store: Store
    paths: Sequence[Sequence[Path]]

    def compute(self, watch: Watch) -> None:
        """Every model's states that are not there. Called on every rank. Errors: UserError for states that are no numbers."""
        for number, (name, _) in enumerate(self.plan.models):
            missing = on_main(partial(_not_there, self.paths[number]))
            if missing:
                total = sum(len(self.sets[place].texts) for place in missing)
                with self._open(number) as backend:
                    advance = watch(f"states of {name}", total, 0) if is_main() else lambda count: None
                    for place in missing:
                        self._compute(backend, number, place, advance)

    def _compute(self, backend: Backend, number: int, place: int, advance: Any) -> None:
        states = backend.pooled(self.tokens[number][place].ids, self.cfg.batch_tokens, advance)

        def keep() -> None:
            assert states is not None, "rank 0 has them"
            name, folder = self.plan.models[number]
            check_finite(states.numpy(), name, folder, self.sets[place].name)
            self.store.write(self.paths[number][place], states.numpy())

        on_main(keep)

    def _open(self, number: int) -> AbstractContextManager[Backend]:
        folder = self.plan.models[number][1]
        if self.cfg.backend == "transformers":
            return open_transformers(folder, self.precision, self.cfg.device)
        from megatron_prism.engine.hidden_states import open_engine

        return open_engine(folder, self.plan.layouts[number], self.precision, self.cfg.device)

    def results(self) -> Figures:
        """The content of cka.json, from the states that are there."""
        return {
            "schema_version": SCHEMA_VERSION,
            "centred": self.cfg.centred,
            "backend": self.cfg.backend,
            "precision": self.precision,
            "last_point": LAST_POINT,
            "bootstrap": self.cfg.bootstrap.model_dump(mode="json"),
            "models": [self._model(number) for number in range(len(self.plan.models))],
            "sets": [self._set(place) for place in range(len(self.sets))],
            "pairs": [self._pair(pair) for pair in self.plan.pairs],
        }

    def _model(self, number: int) -> Figures:
        (name, folder), shape = self.plan.models[number], self.plan.shapes[number]
        sizes = {"num_layers": depth(shape), "hidden_size": shape.hidden_size, "points": depth(shape) + 1}
        return {"name": name, "path": str(folder), "fingerprint": self.fingerprints[number], "family": shape.family, **sizes}

    def _set(self, place: int) -> Figures:
        """As the first model reads it."""
        texts, read = self.sets[place], self.tokens[0][place]
        lengths = [len(row) for row in read.ids]
        return {"name": texts.name, "from": texts.origin, "inputs": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "cut": read.cut}

    def _pair(self, pair: Compared) -> Figures:
        names, listed = [name for name, _ in self.plan.models], [texts.name for texts in self.sets]
        found = [self._on_set(pair, place) for place in range(len(self.sets))]
        ends = {"start": names[pair.start], "end": names[pair.end]}
        return {"label": pair.label, **ends, "paper": paper(pair.paper, listed), "sets": found}

    def _on_set(self, pair: Compared, place: int) -> Figures:
        one, other = (self.store.read(self.paths[model][place]) for model in (pair.start, pair.end))
        asked = self.cfg.bootstrap
        draws = cka.draw(one.shape[1], asked.size, asked.draws, asked.seed)
        alike = [cka.compare(cka.layer(x, self.cfg.centred), cka.layer(y, self.cfg.centred), draws) for x, y in zip(one, other, strict=True)]
        return {"set": self.sets[place].name, "points": [of_point(number, found) for number, found in enumerate(alike)], "min": of_least(alike)}


def prepare(cfg: Config, plan: Plan, fingerprints: Sequence[str], precision: Precision, device_type: str) -> Work:
    """Read texts and their tokens. Errors: UserError for sets that are too small."""
    from transformers import AutoTokenizer

    sets = read_sets(cfg)
    tokenizers = [
        AutoTokenizer.from_pretrained(run_folder.hf_files(folder), local_files_only=True, trust_remote_code=False) for _, folder in plan.models
    ]
    tokens = [[read_tokens(texts, tokenizer, cfg.max_tokens, not cfg.own_tokenizers) for texts in sets] for tokenizer in tokenizers]
    store = Store(cfg.output, [cfg.backend, precision, device_type])
    paths = [
        [store.path(name, [str(folder.resolve()), fingerprint], texts.name, read) for texts, read in zip(sets, row, strict=True)]
        for (name, folder), fingerprint, row in zip(plan.models, fingerprints, tokens, strict=True)
    ]
    return Work(cfg, plan, precision, fingerprints, sets, tokens, store, paths)


def of_point(number: int, found: cka.Alike | None) -> Figures:
    """One layer's figures; all None where it has none."""
    keys = ("cka", "mean", "std", "low", "high", "shuffled")
    if found is None:
        return {"point": number, **dict.fromkeys(keys), "degenerate": NO_SPREAD}
    draws = found.draws
    values = (found.cka, *(float(value) for value in (draws.mean(), draws.std(ddof=1), draws.min(), draws.max())), found.shuffled)
    return {"point": number, **dict(zip(keys, values, strict=True)), "degenerate": None}


def of_least(alike: Sequence[cka.Alike | None]) -> Figures | None:
    """The layer that is least alike, and each draw's own least."""
    least = cka.minimum(alike)
    if least is None:
        return None
    point, minima = least
    there = of_point(point, alike[point])
    means = {"mean_of_draw_minima": float(minima.mean()), "std_of_draw_minima": float(np.std(minima, ddof=1))}
    return {"point": point, "mean": there["mean"], "std": there["std"], **means}


def _not_there(paths: Sequence[Path]) -> list[int]:
    return [place for place, path in enumerate(paths) if not path.is_file()]


def is_main() -> bool:
    """Whether this process writes files and talks to people."""
    return dist.get_rank() == 0
