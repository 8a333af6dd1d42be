"""Reading a long text a chunk at a time: no logits but the chunk's, no mask but chunk x what was read, activations of one chunk.

What a model knows of what it read is in its cache (keys and values, or states), so that the chunks after one another are the whole text. Owns: where
chunks begin, the logits of a text. Refuses nothing.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 2048
"""A mask of 2,048 x 131,072 takes 512 MiB in bf16, the logits of 2,048 tokens over 128,256 ids 1 GiB in fp32"""


def chunks(length: int, size: int | None = None) -> list[slice]:
    """Cuts of 0 to `length`, at least 1, into the fewest parts of at most `size` (None: CHUNK_TOKENS), as equal as can be: none has one token alone,
    which models take for a step of writing."""
    parts = -(-length // (size or CHUNK_TOKENS))
    ends = [length * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


@torch.inference_mode()
def logits_of(model: Any, tokens: Sequence[int], size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """A transformers model's logits [c, vocabulary] for each chunk of one text, in order, with the places of its tokens."""
    ids_w, cache = torch.tensor(tokens, device=model.device), None
    for part in chunks(len(tokens), size):
        found = model(input_ids=ids_w[None, part], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        yield part, found.logits[0]
