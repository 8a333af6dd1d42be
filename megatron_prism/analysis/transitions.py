"""Which questions a model learned to solve, and which it lost: k of n samples right at the start -> k of n at the end. Pure; no torch.

A question that was solved in none of n samples may be one that is solved in one of 50, so some of them are solved the next time without any learning.
How many is known where the question's rate did not change: of its K right responses among both models' samples, any are then as likely to be the
end's, and the chance that none is the start's is C(n_end, K) / C(n_start + n_end, K). Both numbers are given beside what was found.
Owns: the matrix, these expectations, and the course of prompts through a run by what a filter had found for them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_prism.analysis.behaviour import mean_interval

Solved = Mapping[str, tuple[int, int]]
"""id of a question -> right samples, samples"""
ALL_DOMAINS = None


def transitions(start: Solved, end: Solved, is_random: bool = True) -> dict[str, Any]:
    """Of questions that both models answered, each with one number of samples. is_random: drawn again, answers may be others; else nothing is
    expected of chance."""
    assert start.keys() == end.keys(), "the same questions"
    samples = [max(n for _, n in side.values()) for side in (start, end)]
    counts = [[0] * (samples[1] + 1) for _ in range(samples[0] + 1)]
    newly, lost, chance = [], [], [0.0, 0.0]
    for name, (before, n_before) in start.items():
        after, n_after = end[name]
        counts[before][after] += 1
        if not before and after:
            newly.append(name)
        if before and not after:
            lost.append(name)
        if before + after:
            chance[0] += _chance_of_none(before + after, n_before, n_after)
            chance[1] += _chance_of_none(before + after, n_after, n_before)
    never = counts[0][0]
    return {
        "samples": samples,
        "counts": counts,
        "newly_solved": len(newly),
        "lost": len(lost),
        "never": never,
        "kept": len(start) - len(newly) - len(lost) - never,
        "expected": {"newly_solved": chance[0], "lost": chance[1]} if is_random else None,
        "newly_solved_ids": newly,
        "lost_ids": lost,
    }


class Filtered(NamedTuple):
    """What the solvability filter found for a prompt: its domain, right samples, samples."""

    domain: str
    right: int
    samples: int


class Kept(NamedTuple):
    """A step whose responses were kept: of each prompt, right samples and samples."""

    step: int
    solved: Solved


def course(prompts: Mapping[str, Filtered], steps: Iterable[Kept], at_most: int, window: int, resamples: int) -> list[dict[str, Any]]:
    """For 0, 1, ... `at_most` right samples in the filter, over all domains and of each where there are several: the pass rate through a run.

    window: kept steps that one point holds. A prompt that the filter did not measure is in no curve.
    """
    groups: dict[tuple[str | None, int], list[dict[str, Any]]] = {}
    domains = sorted({found.domain for found in prompts.values()})
    for part in _windows(list(steps), window):
        solved = _together(part)
        for domain in (ALL_DOMAINS, *(domains if len(domains) > 1 else ())):
            for right in range(at_most + 1):
                asked = [
                    name for name in solved if name in prompts and prompts[name].right == right and domain in (ALL_DOMAINS, prompts[name].domain)
                ]
                if asked:
                    groups.setdefault((domain, right), []).append(_point(part, [solved[name] for name in asked], resamples))
    return [{"domain": domain, "right": right, "points": points} for (domain, right), points in sorted(groups.items(), key=_order)]


def _point(part: Sequence[Kept], solved: Sequence[tuple[int, int]], resamples: int) -> dict[str, Any]:
    rates = [right / samples for right, samples in solved]
    low, high = mean_interval(rates, resamples, [part[-1].step])
    return {
        "first_step": part[0].step,
        "step": part[-1].step,
        "prompts": len(solved),
        "responses": sum(samples for _, samples in solved),
        "pass_rate": math.fsum(rates) / len(rates),
        "low": low,
        "high": high,
        "solved": sum(right > 0 for right, _ in solved) / len(solved),
    }


def _together(part: Iterable[Kept]) -> dict[str, tuple[int, int]]:
    """Right samples and samples of each prompt over several steps."""
    found: dict[str, tuple[int, int]] = {}
    for kept in part:
        for name, (right, samples) in kept.solved.items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + right, before[1] + samples)
    return found


def _windows(steps: Sequence[Kept], size: int) -> list[Sequence[Kept]]:
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def _chance_of_none(right: int, n_first: int, n_second: int) -> float:
    """That none of `right` responses, any of both models' as likely as another, is the first's."""
    return math.comb(n_second, right) / math.comb(n_first + n_second, right)


def _order(item: tuple[tuple[str | None, int], Any]) -> tuple[str, int]:
    (domain, right), _ = item
    return domain or "", right
