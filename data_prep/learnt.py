"""Which tokens of a blend's sources count in the loss: all, or those of answers alone. The recipe says it for the run, a blend.toml for a source.

Owns: that choice, what a run records of its sources, the words for it. Refuses: answers of a source whose preparation did not mark them.
"""

from collections.abc import Sequence
from typing import Any

from megatron_prism.data_prep.blend import BlendSource, Loss
from megatron_prism.data_prep.manifest import Manifest
from megatron_prism.errors import UserError


def answers_alone(source: BlendSource, loss: Loss) -> bool:
    """Whether a source teaches its answers alone; loss: the recipe's."""
    return (source.loss or loss) == "answers"


def check(sources: Sequence[BlendSource], manifests: Sequence[Manifest], loss: Loss) -> None:
    """Errors: UserError naming the sources that are to teach answers and have none marked, and the ways out."""
    pairs = [(source, manifest) for source, manifest in zip(sources, manifests, strict=True) if answers_alone(source, loss)]
    if adopted := [source.name for source, manifest in pairs if manifest.num_answers is None and manifest.adopted]:
        raise UserError(
            f"the loss of {', '.join(adopted)} is to count answers alone, and adopted shards (prism adopt) have no answer masks: a .bin does not say "
            "which tokens are answers; make the source from its text with prism prep (messages, or format with answers: docs/sft.md), or set "
            "loss = 'all' for it in blend.toml, or data.loss='all'"
        )
    if unknown := [source.name for source, manifest in pairs if manifest.num_answers is None]:
        raise UserError(
            f"the loss of {', '.join(unknown)} is to count answers alone, and nobody marked them when the shards were made; prepare the source again "
            "(messages, or format with answers: docs/sft.md), or set loss = 'all' for it in blend.toml, or data.loss='all'"
        )
    for source, manifest in pairs:
        if not manifest.num_answers:
            raise UserError(f"{manifest.folder} holds no answer: none of its tokens would count; leave {source.name} out, or set loss = 'all' for it")


def records(sources: Sequence[BlendSource], manifests: Sequence[Manifest], loss: Loss) -> list[dict[str, Any]]:
    """What a run keeps of its sources (`history`), to go on with the same ones."""
    found = []
    for source, manifest in zip(sources, manifests, strict=True):
        answers = answers_alone(source, loss)
        record = {"name": source.name, "weight": source.weight, "digest": manifest.digest(answers), "tokens": manifest.num_tokens}
        found.append(record | ({"loss": "answers"} if answers else {}))
    return found


def describe(sources: Sequence[BlendSource], manifests: Sequence[Manifest], loss: Loss) -> str | None:
    """One line: the share of each source's tokens that count; None where all do."""
    pairs = [(source.name, manifest) for source, manifest in zip(sources, manifests, strict=True) if answers_alone(source, loss)]
    if not pairs:
        return None
    parts = [f"{name} {(manifest.num_answers or 0) / manifest.num_tokens:.2%} of its tokens" for name, manifest in pairs]
    rest = "" if len(pairs) == len(sources) else "; of the other sources all tokens"
    return f"the loss counts answers alone: {', '.join(parts)}{rest}"
