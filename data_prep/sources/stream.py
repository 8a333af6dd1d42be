"""Rows of datasets on the Hugging Face hub, streamed with the `datasets` package, which only this file imports and only when it is used.

Owns: opening streams, naming columns that a dataset no longer has. Refuses: a machine without the package or without the network.
"""

from collections.abc import Iterator
from typing import Any

from megatron_prism.data_prep.formats import PART
from megatron_prism.errors import UserError


def rows(datasets: list[dict[str, Any]], columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the datasets, one dataset after another, with these columns and the number of the dataset.

    Called as a prep source's function. Errors: UserError for a missing package, an unreachable dataset, and a column that is not there.
    """
    load = _load_dataset()
    for number, dataset in enumerate(datasets):
        where = " ".join(str(dataset[key]) for key in ("id", "config", "folder", "split") if dataset.get(key))
        try:
            options = {"data_dir": dataset.get("folder"), "split": dataset.get("split", "train"), "revision": dataset.get("revision")}
            stream = load(dataset["id"], dataset.get("config"), streaming=True, **options)
        except (OSError, ValueError) as error:  # what `datasets` raises for no network, and for unknown ids, configs and splits
            raise UserError(f"dataset {where} cannot be opened ({error}); check the network and the id, or give paths to a local copy") from None
        for row in stream:
            if missing := [column for column in columns if column not in row]:
                raise UserError(f"dataset {where} has no column {missing[0]!r}; it has {', '.join(row)}: its schema changed; set revision or columns")
            yield {**{column: row[column] for column in columns}, PART: str(number)}


def _load_dataset() -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            'streaming from the hub needs the datasets package: pip install "megatron-prism[hub]"; or give paths to a local copy'
        ) from None
    return load_dataset
