"""`prism prep`: text -> token shards, their manifests, and a blend.

    OUTPUT/blend.toml   OUTPUT/tokenizer/   OUTPUT/NAME/{report.json, train/, validation/}
Killed at any moment, it goes on when run again with the same recipe; the result is the same, byte for byte.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from megatron_prism.data_prep.settings import PrepConfig as Config

if TYPE_CHECKING:
    from megatron_prism.data_prep.merge import SourceReport
    from megatron_prism.data_prep.prepare import Result

__all__ = ["Config", "dry_run", "parents", "run"]


def parents(cfg: Config) -> list[Path]:
    """None: text is no artifact. Changed inputs are found by their fingerprints."""
    return []


def run(cfg: Config) -> Path:
    """Prepare every source, or this process's share; returns the output. A finished output of the same recipe and inputs is left as it is."""
    from megatron_prism.data_prep import allocator, output, parts, prepare
    from megatron_prism.data_prep.progress import console

    place = parts.find_place(cfg)

    def work() -> prepare.Result:
        if slower := allocator.what_is_missing():
            console.print(slower, highlight=False, soft_wrap=True, markup=False)
        result = prepare.prepare(cfg, place)
        if place.world == 1:
            prepare.finish(cfg)
        return result

    result = output.make(cfg.output, cfg, "inputs", lambda: prepare.input_changes(cfg, place), work, shared=place.world > 1)
    if result is not None:
        _show(cfg, result, f"process {place.rank} of {place.world}, " if place.world > 1 else "")
    return cfg.output


def _show(cfg: Config, result: "Result", process: str) -> None:
    from megatron_prism.data_prep.progress import console, show

    rates = f"{result.documents_per_second:,.0f} documents/s, {result.text_megabytes_per_second:,.1f} MB/s, {result.tokens_per_second:,.0f} tokens/s"
    line = f"{cfg.output}: {process}{result.parts:,} parts in {result.seconds:,.1f} s, {rates}"
    if result.missing:
        line += f"; {result.missing:,} parts of other processes are missing: the last of them joins all (if none is left: run any of them again)"
    elif result.sources:
        show(_table(cfg, result.sources))
        documents = sum(source.documents + source.held_out_documents for source in result.sources)
        tokens = sum(source.tokens + source.held_out_tokens for source in result.sources)
        line += f"; complete with {documents:,} documents, {tokens:,} tokens"
    else:
        line += "; another process joined all"
    console.print(line, highlight=False, soft_wrap=True)


def _table(cfg: Config, sources: Sequence["SourceReport"]) -> Table:
    table = Table("source", "domain", title="documents and tokens for training; held out in brackets")
    for column in ("documents", "tokens", "text MB", "dropped", "bad", "empty", "share %"):
        table.add_column(column, justify="right")
    weights = [source.weight or report.tokens for source, report in zip(cfg.source, sources, strict=True)]
    for report, weight in zip(sources, weights, strict=True):
        documents = f"{report.documents:,} ({report.held_out_documents:,})"
        tokens = f"{report.tokens:,} ({report.held_out_tokens:,})"
        counts = (
            f"{report.text_bytes / 1e6:,.1f}",
            f"{sum(report.dropped.values()):,}",
            f"{sum(report.bad.values()):,}",
            f"{report.empty:,}",
            f"{100 * weight / sum(weights):.2f}",
        )
        table.add_row(report.name, report.domain, documents, tokens, *counts)
    return table


def dry_run(cfg: Config) -> None:
    """List the inputs and their sizes; reads none of them, writes nothing."""
    from megatron_prism.data_prep import prepare
    from megatron_prism.data_prep.progress import show

    table = Table("source", "domain", "kind", "inputs", "MB", "first", title=f"prep -> {cfg.output}")
    for source, files in zip(cfg.source, prepare.find_all_inputs(cfg).values(), strict=True):
        kinds = "+".join(sorted({file.kind for file in files}))
        megabytes = f"{sum(file.bytes for file in files) / 1e6:,.1f}" if source.paths else "?"
        table.add_row(source.name, source.domain, kinds, f"{len(files):,}", megabytes, files[0].path)
    show(table)
