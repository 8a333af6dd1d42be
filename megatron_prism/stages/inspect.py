"""Inspect: what is in prepared data, as one HTML page.

prism inspect OUTPUT|blend.toml [--page inspect.html] [--seq-len 8192] [--tokens 27e9] [--samples 3]

Not a stage of a pipeline: the page is no artifact. Owns the words of the command; figures and page are `data_prep.inspection`'s. No torch.
Refuses: what is neither a prep output nor a blend, and overwriting a file that is no such page.
"""

from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.errors import UserError


def run(target: Path, page: Path, seq_len: int, training_tokens: float | None, samples: int) -> Path:
    """Write the page and say where. Errors: UserError."""
    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.data_prep.inspection import figures
    from megatron_prism.data_prep.inspection import page as pages

    if page.exists() and not (page.is_file() and pages.OPENING.encode() in page.read_bytes()):
        raise UserError(f"{page} exists and is no page of `prism inspect`; choose another --page")
    if training_tokens is not None and not 1 <= training_tokens < 1e18:
        raise UserError(f"--tokens {training_tokens:g}: give how many tokens the run trains on, such as 27e9")
    blend = load_blend(target)
    found = figures.figures(blend, seq_len, None if training_tokens is None else int(training_tokens))
    shown = {source.name: _documents(source.train, samples) for source in blend.sources}
    artifact.write_atomic(page, pages.write(str(target), found, shown))
    print(f"{page}: {found['totals']['documents']:,} documents, {found['totals']['tokens']:,} tokens of {len(found['sources'])} sources")
    return page


def _documents(split: Path, count: int) -> Any:
    """A split's sampled documents with their decoded tokens, or a line that says why there are none."""
    from megatron_prism.data_prep.inspection import samples
    from megatron_prism.data_prep.manifest import load_manifest

    tokenizer = split.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        return f"{tokenizer} does not exist: without the tokenizer there is no text to show"
    excerpts = samples.choose(load_manifest(split), count)
    return [(excerpt, *both) for excerpt, both in zip(excerpts, samples.decode(tokenizer, excerpts), strict=True)]
