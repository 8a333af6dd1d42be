"""Graded groups become what a policy step is given: sequences with an advantage and a weight beside every token that the model wrote.

Owns: which responses take part. Left out: those whose grading failed, those without a written token, and under dynamic sampling whole groups whose
rewards are all equal. Legend: p prompts, g responses to each, n tokens of a prompt and its response.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prism.engine.policy import Sequence
from megatron_prism.rl.objective import advantages, equal_rewards, token_weights
from megatron_prism.rl.records import Response
from megatron_prism.rl.rollouts import Group
from megatron_prism.rl.settings import ObjectiveConfig


@dataclass(frozen=True)
class Batch:
    """advantages_pg: of every response, zero where it is left out. sequences: of those that take part, in order."""

    advantages_pg: list[list[float]]
    sequences: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Tokens that the trainer reads: prompts with their responses."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    def with_row(self, name: str, values: Several[NDArray[np.float32]]) -> "Batch":
        """A further number beside each token: [n] for each sequence."""
        rows = zip(self.sequences, values, strict=True)
        return replace(self, sequences=[replace(sequence, rows={**sequence.rows, name: row}) for sequence, row in rows])


def batch_of(groups: Several[Group], config: ObjectiveConfig) -> Batch:
    """A step's groups under an objective. Errors: UserError naming the prompt of a reward that is no number."""
    rewards_pg, known_pg = rewards_of(groups)
    lengths_pg = torch.tensor([[sum(response.written) for response in group.responses] for group in groups])
    takes_part_p = ~equal_rewards(rewards_pg, known_pg) if config.dynamic_sampling else torch.ones(len(groups), dtype=torch.bool)
    advantage_pg = advantages(rewards_pg, config, known_pg, [group.prompt.id for group in groups])
    weight_pg = token_weights(torch.where(known_pg & takes_part_p[:, None], lengths_pg, 0), config)
    return Batch(advantage_pg.tolist(), _sequences(groups, advantage_pg, weight_pg))


def rewards_of(groups: Several[Group]) -> tuple[Tensor, Tensor]:
    """Rewards [p, g] in float64, and which of them are known: those whose grading did not fail."""
    rewards_pg = torch.tensor([[reward.value for reward in group.rewards] for group in groups], dtype=torch.float64)
    return rewards_pg, torch.tensor([[not reward.failed for reward in group.rewards] for group in groups])


def _sequences(groups: Several[Group], advantage_pg: Tensor, weight_pg: Tensor) -> list[Sequence]:
    return [
        sequence_of(response, float(advantage_pg[p, g]), float(weight_pg[p, g]))
        for p, group in enumerate(groups)
        for g, response in enumerate(group.responses)
        if weight_pg[p, g] > 0
    ]


def sequence_of(response: Response, advantage: float = 0.0, weight: float = 0.0) -> Sequence:
    """A prompt with a response, as the trainer reads them; what the response is worth beside each token."""
    prompt = response.prompt.tokens
    tokens = np.array([*prompt, *response.tokens], dtype=np.int64)
    scored = np.array([False] * len(prompt) + list(response.written))
    generator = np.array([0.0] * len(prompt) + list(response.logprobs), dtype=np.float32)
    constant = {name: np.full(len(tokens), value, dtype=np.float32) for name, value in (("advantage", advantage), ("weight", weight))}
    return Sequence(tokens, scored, {"generator": generator, **constant})
