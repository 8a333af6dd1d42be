"""What a step of RL says about itself: figures of its groups, in all and by domain, and the line for people. Pure functions.

    reward, reward_std                    over responses; what failed to be graded is left out of all figures of rewards
    pass_rate, solved                     right responses of all; prompts with a right response
    solved_from_zero                      prompts with a right response that had none whenever they were asked before
    format, truncated, length             past the format gate; cut off by the limit; tokens that the model wrote
    entropy                               mean -log p of the written tokens under the generator, an estimate of the policy's entropy
    groups_all_equal                      groups whose rewards are all the same: they teach nothing
    gradings, gradings_failed             answers that were graded; gradings that say nothing
    penalty_NAME                          mean of what a penalty took off

Each also as NAME/DOMAIN where there are several domains. Owns: their definitions, and which prompts were never solved so far.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from megatron_prism.rl.batch import rewards_of
from megatron_prism.rl.objective import equal_rewards
from megatron_prism.rl.rollouts import Group

Figures = dict[str, float]


@dataclass
class Unsolved:
    """Prompts that were asked and never answered right so far, by id."""

    ids: set[str] = field(default_factory=set)

    def settle(self, groups: Sequence[Group]) -> set[str]:
        """Take in a step: the ids that had no right response before and have one now."""
        solved = {group.prompt.id for group in groups if group.num_correct}
        found = solved & self.ids
        self.ids = (self.ids | {group.prompt.id for group in groups}) - solved
        return found


def figures(groups: Sequence[Group], from_zero: set[str], domains: Collection[str]) -> Figures:
    """A step's figures; from_zero: what `Unsolved.settle` said of it. domains: of all prompts of the run; a step may lack some."""
    found = _figures(groups, from_zero)
    for domain in sorted(domains) if len(domains) > 1 else ():
        part = [group for group in groups if group.prompt.domain == domain]
        found |= {f"{name}/{domain}": value for name, value in _figures(part, from_zero).items()} if part else {}
    return found


def _figures(groups: Sequence[Group], from_zero: set[str]) -> Figures:
    responses = [response for group in groups for response in group.responses]
    rewards = [reward for group in groups for reward in group.rewards]
    graded = [reward for reward in rewards if not reward.failed]
    written = [sum(response.written) for response in responses]
    values = [reward.value for reward in graded] or [0.0]
    found = {
        "reward": fmean(values),
        "reward_std": pstdev(values),
        "pass_rate": sum(group.num_correct for group in groups) / max(len(graded), 1),
        "solved": fmean(bool(group.num_correct) for group in groups),
        "solved_from_zero": float(sum(group.prompt.id in from_zero for group in groups)),
        "format": fmean(reward.passed_format for reward in rewards),
        "truncated": fmean(response.finish_reason == "length" for response in responses),
        "length": fmean(written),
        "length_max": float(max(written)),
        "entropy": -sum(sum(response.logprobs) for response in responses) / max(sum(written), 1),
        "groups_all_equal": float(equal_rewards(*rewards_of(groups)).sum()),
        "gradings": float(sum(reward.verdict is not None for reward in rewards)),
        "gradings_failed": float(len(rewards) - len(graded)),
    }
    names = sorted({name for reward in graded for name in reward.penalties})
    return found | {f"penalty_{name}": sum(reward.penalties.get(name, 0.0) for reward in graded) / len(graded) for name in names}


def training(loss: float, grad_norm: float, sums: Mapping[str, float]) -> Figures:
    """What the last update of a step saw, from the sums of `objective.policy_loss`: means over the tokens that count, the mismatch's maximum too."""
    tokens = sums["tokens"]
    names = ("ratio", "clipped_low", "clipped_high", "capped", "mismatch", "mismatch_k3", "kl")
    means = {name: sums[name] / tokens for name in names if name in sums}
    return {"loss": loss, "grad_norm": grad_norm, "trained_tokens": tokens, **means, "mismatch_max": sums["mismatch_max"]}


def with_probe(found: Figures, probed: Figures) -> Figures:
    """A step whose responses may be of older weights. Their mismatch then counts what the policy has moved since, and becomes `lag_mismatch`; what
    trainer and generator are off by at equal weights, as `ahead.mismatch` found it, is the mismatch that an alarm judges."""
    moved = {"lag_mismatch": found["mismatch"]} if "mismatch" in found and "mismatch" in probed else {}
    return found | moved | probed


def speeds(seconds: Mapping[str, float], written_tokens: int, writing_seconds: float, trained_tokens: int) -> Figures:
    """Seconds of each phase and of all, generation's share of them, tokens a second that were written and trained on (over all ranks).

    writing_seconds: that these tokens took, which may have passed beside the trainer's; the phase "generation" is what the step waited for.
    """
    total = sum(seconds.values())
    return {
        **{f"seconds/{phase}": spent for phase, spent in seconds.items()},
        "seconds_per_step": total,
        "generation_share": seconds["generation"] / total,
        "generated_tokens_per_second": written_tokens / writing_seconds,
        "trained_tokens_per_second": trained_tokens / seconds["training"],
    }


def line(step: int, steps: int, found: Mapping[str, Any]) -> str:
    """A step, for people."""
    parts = [f"step {step}/{steps}", f"reward {found['reward']:.3f}", f"right {100 * found['pass_rate']:.1f} %", f"length {found['length']:.0f}"]
    parts += [f"entropy {found['entropy']:.3f}", *([f"KL {found['kl']:.2g}"] if "kl" in found else [])]
    parts += [f"mismatch {found['mismatch']:.1e}", f"grad norm {found['grad_norm']:.3f}"] if found["updated"] else ["nothing to learn from"]
    parts += [f"lr {found['lr']:.2e}"]
    parts += [f"{found['seconds_per_step']:.1f} s, {100 * found['generation_share']:.0f} % of it generation"]
    if found["gradings_failed"]:
        parts.append(f"{found['gradings_failed']:.0f} gradings failed")
    return "  ".join(parts)
