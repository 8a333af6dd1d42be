"""Whether a prompt and what may be written after it fit the model, and what to do where they do not; how many of them fit a device at a time.

Owns: the limit of each request, the memory that a row's cache takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.generate.interface import OnTooLong, Request, Sampling

CACHE_SHARE = 0.8
"""of free memory, for caches; the rest is for what a chunk or a step computes, and for the layer whose cache grows"""


@dataclass(frozen=True)
class Fitted:
    """A request as the model sees it: its prompt, perhaps cut on the left, and how much may be written."""

    request: Request
    prompt: tuple[int, ...]
    max_new_tokens: int

    @property
    def prompt_tokens_cut(self) -> int:
        """Tokens of the prompt that the model does not see."""
        return len(self.request.prompt) - len(self.prompt)


def fit(requests: Sequence[Request], sampling: Sampling, positions: int | None, on_too_long: OnTooLong) -> list[Fitted]:
    """Every request with its limit.

    positions: tokens that the model reads at most; None: no limit is known. on_too_long: "refuse" a request whose prompt and `max_new_tokens` pass
    it; "shorten": lower `max_new_tokens` to what is left; "truncate_left": drop the prompt's first tokens.
    """
    found = [(request, _fit(request, sampling, positions, on_too_long)) for request in requests]
    refused = [request for request, fitted in found if fitted is None]
    if refused:
        assert positions is not None
        longest = max(refused, key=lambda request: len(request.prompt))
        raise UserError(_message(len(refused), len(found), len(longest.prompt), _wanted(longest, sampling), positions, on_too_long))
    return [fitted for _, fitted in found if fitted is not None]


def _fit(request: Request, sampling: Sampling, positions: int | None, on_too_long: OnTooLong) -> Fitted | None:
    """None: there is no room."""
    prompt, wanted = tuple(request.prompt), _wanted(request, sampling)
    if not prompt:
        raise UserError("a prompt has no tokens; give at least one token, such as the tokenizer's beginning-of-sequence token")
    if positions is None or len(prompt) + wanted <= positions:
        return Fitted(request, prompt, wanted)
    if on_too_long == "shorten" and len(prompt) < positions:
        return Fitted(request, prompt, positions - len(prompt))
    if on_too_long == "truncate_left" and wanted < positions:
        return Fitted(request, prompt[-(positions - wanted) :], wanted)
    return None


def _wanted(request: Request, sampling: Sampling) -> int:
    return min(request.max_new_tokens or sampling.max_new_tokens, sampling.max_new_tokens)


def _message(refused: int, asked: int, length: int, wanted: int, positions: int, on_too_long: OnTooLong) -> str:
    room = positions - length
    ways = [f"max_new_tokens={room}, or on_too_long=shorten"] if room > 0 else []
    ways += ["on_too_long=truncate_left"] if wanted < positions and on_too_long != "truncate_left" else []
    fix = "try " + ", or ".join(ways) if ways else f"try max_new_tokens below {positions}" if wanted >= positions else "leave them out"
    return (
        f"{refused} of {asked} prompts leave no room: the longest has {length} tokens, which with max_new_tokens={wanted} pass the model's limit of "
        f"{positions} tokens (max_position_embeddings, or max_model_len); {fix}"
    )


def fit_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], positions: int | None, on_too_long: OnTooLong
) -> list[tuple[list[int], list[int]]]:
    """Pairs of prompt and continuation that the model can read; "truncate_left" drops the first tokens of prompts, the others refuse."""
    return [_fit_pair(list(prompt), list(continuation), positions, on_too_long) for prompt, continuation in pairs]


def _fit_pair(prompt: list[int], continuation: list[int], positions: int | None, on_too_long: OnTooLong) -> tuple[list[int], list[int]]:
    if not prompt:
        raise UserError("a continuation is scored after at least one token, such as the tokenizer's beginning-of-sequence token")
    excess = 0 if positions is None else len(prompt) + len(continuation) - positions
    if excess <= 0:
        return prompt, continuation
    if on_too_long == "truncate_left" and excess < len(prompt):
        return prompt[excess:], continuation
    fix = "; try on_too_long=truncate_left" if excess < len(prompt) else ""
    raise UserError(f"a prompt of {len(prompt)} tokens and a continuation of {len(continuation)} pass the model's limit of {positions} tokens{fix}")


def cache_bytes_per_token(config: Any, number_bytes: int) -> int:
    """What one token's keys and values take in a transformers model, by its config: of the layers with attention, their windows not counted on."""
    kinds = getattr(config, "layers_block_type", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and kind != "linear_attention" for kind in kinds)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * layers * kv_heads * head_dim * number_bytes)


def rows_in_memory(fitted: Sequence[Fitted], bytes_per_token: int, free_bytes: int) -> int:
    """How many rows as long as the longest request's end have room for their caches; at least one, which is tried whatever there is."""
    longest = max((len(one.prompt) + one.max_new_tokens for one in fitted), default=1)
    return max(1, int(CACHE_SHARE * free_bytes) // max(1, longest * bytes_per_token))
