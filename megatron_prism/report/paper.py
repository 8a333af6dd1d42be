"""The paper's rows beside ours: which of its models ours is, and its tables as they are printed, misprints marked.

Owns: telling the paper's model from a shape (the published configs of its seven models), and what is said with each table.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prism import families
from megatron_prism.errors import UserError
from megatron_prism.evals.reference import Table, load_table
from megatron_prism.families.compare import POSITIONS, model_difference
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.report.runs import Artifact

MODELS = {
    "granite-3.3-8b": "granite-3.3-8b-base",
    "granite-4.0-micro": "granite-4.0-micro-base",
    "granite-4.0-h-micro": "granite-4.0-h-micro-base",
    "llama-3.1-8b": "llama-3.1-8b",
    "mistral-7b": "mistral-7b-v0.1",
    "mistral-small-24b": "mistral-small-24b-base-2501",
    "nemotron-h-8b": "nemotron-h-8b-base-8k",
}
"""the paper's name -> the published config"""
TABLES = ("T6", "T11", "PAGE")
"""with rows for several models"""
OF_ONE = {"granite-3.3-8b": ("T19", "T4", "T7", "BASE-RL"), "granite-4.0-micro": ("T3", "T8", "T20")}
"""tables that are of one model"""
CONFIGS = ("hf_files/config.json", "hf/config.json", "config.json")
MISPRINT = "†"


class Printed(NamedTuple):
    """A row as the paper prints it, by column; misprints: columns whose figure is not what its own row gives."""

    name: str
    table: Table
    values: dict[str, float | None]
    misprints: frozenset[str]


def model_of(every: Sequence[Artifact], asked: str | None) -> str | None:
    """The paper's name of the model that these artifacts are of: what was asked for, else the first shape that is one of its models'."""
    if asked is not None:
        if asked not in MODELS:
            raise UserError(f"paper={asked!r} must be a model of the paper: {', '.join(MODELS)}")
        return asked
    for one in every:
        for name in CONFIGS if one.is_shown else ():
            found = _named(one.folder / name)
            if found is not None:
                return found
    return None


def rows(model: str, columns: Sequence[str]) -> list[Printed]:
    """The paper's rows of a model that have any of these columns, table by table."""
    found: list[Printed] = []
    for table in map(load_table, [*TABLES, *OF_ONE.get(model, ())]):
        for row in table.rows:
            parts = dict(zip(table.keys, row.split("/"), strict=True))
            values = {column: value for column, value in table.row(row).items() if column in columns}
            if values and (table.id not in TABLES or parts["model"] == model):
                wrong = frozenset(entry.column for entry in table.contradictions if entry.row == row)
                found.append(Printed(_label(table, parts), table, values, wrong))
    return found


def notes(found: Sequence[Printed]) -> list[str]:
    """What has to be said with these rows: sources, caveats, misprints."""
    tables = {row.table.id: row.table for row in found}
    said = []
    for table in tables.values():
        said += [f"{table.id}: {table.title} ({table.source})."] + [f"{table.id}: {caveat}" for caveat in table.caveats]
        said += [f"{MISPRINT} {table.id}, {entry.row}, {entry.column}: {entry.note}." for entry in table.contradictions]
    return said


def _label(table: Table, parts: dict[str, str]) -> str:
    kept = {key: value for key, value in parts.items() if key != "model" or table.id not in TABLES}
    if "rl" in kept:
        kept["rl"] = "no RL" if kept["rl"] == "none" else f"RL {kept['rl'].upper()}"
    mix = kept.get("mix")
    if mix and mix != "base":
        kept["mix"] = mix.upper()
    return f"paper {table.id}: {', '.join(kept.values()) or 'after RL'}"


def _named(path: Path) -> str | None:
    """The paper's name of a config's shape; None where it is none of its models', or no config that we read."""
    if not path.is_file():
        return None
    try:
        ours = _shape(json.loads(path.read_text(encoding="utf-8")))
    except (UserError, ValueError, KeyError, TypeError):
        return None
    for name, published in MODELS.items():
        if model_difference(ours, _shape(families.published(published)), POSITIONS | {"vocab_size"}) is None:
            return name
    return None


def _shape(config: dict[str, Any]) -> ModelConfig:
    return families.find(config).model_config(config)
