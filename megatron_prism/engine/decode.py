"""Decoding with the trainer's own modules: keys, values and Mamba states are kept, so each new token costs one token's work.

Owns: megatron-core's static inference context around a chunk. Refuses: pipelines (the chunk must be the whole model), sequence
parallelism (one token has no parts), prompts of unequal length.
Text generation for evaluation and RL stands in `generate/`; this is its counterpart without an export.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_prism.engine.model import Chunk
from megatron_prism.errors import UserError


class Decoder:
    """A model and what it remembers of a batch of sequences."""

    def __init__(self, chunk: Chunk, batch_size: int, max_length: int) -> None:
        """max_length: tokens of a sequence, prompt and continuation together. Errors: UserError for a part of a pipeline, or of a sequence."""
        if not (chunk.pre_process and chunk.post_process):
            raise UserError("decoding needs the whole model on each rank: use pp=1 (any tp)")
        if chunk.config.sequence_parallel:
            raise UserError("decoding takes one token at a time, which cannot be cut over ranks: use sp=false (any tp)")
        self.chunk, self.max_length, self.length = chunk.eval(), max_length, 0
        self.context = StaticInferenceContext(batch_size, max_length)
        self.context.materialize_only_last_token_logits = False

    @torch.no_grad()
    def feed(self, ids_bs: Tensor) -> Tensor:
        """Token ids [b, s] that follow what was fed before -> logits [b, s, vocab], fp32, of the real vocabulary. Errors: UserError past the end."""
        new = ids_bs.shape[1]
        if self.length + new > self.max_length:
            raise UserError(f"{self.length} + {new} tokens exceed max_length={self.max_length}")
        if self.length and new > 1:  # after the prompt TransformerEngine's attention is given no causal mask (attention.py:520)
            return torch.cat([self.feed(token) for token in ids_bs.split(1, dim=1)], dim=1)
        positions_bs = torch.arange(self.length, self.length + new, device=ids_bs.device).expand_as(ids_bs)
        if self.length:
            self.context.enable_decode_mode()
        logits: Tensor = self.chunk(ids_bs, positions_bs, None, inference_context=self.context, runtime_gather_output=True)
        self.context.sequence_len_offset += new
        self.length += new
        return logits[..., : self.chunk.vocabulary].float()


def greedy(chunk: Chunk, prompt_bs: Tensor, max_new_tokens: int) -> Tensor:
    """Prompts [b, s] of token ids -> the likeliest continuation, [b, max_new_tokens]; ties to the smaller id."""
    decoder = Decoder(chunk, prompt_bs.shape[0], prompt_bs.shape[1] + max_new_tokens)
    fed, found = prompt_bs, []
    for _ in range(max_new_tokens):
        fed = decoder.feed(fed)[:, -1:].argmax(dim=-1)
        found.append(fed)
    return torch.cat(found, dim=1)
