"""Which source serves sample i, when the blend of a run may change on the way: a history of plans, each from some sample on.

Within one plan the n-th sample of a source of weight w (the weights sum to 1) is due at time (n + 1/2) / w, and samples are served in order of due
time. So the first n samples never depend on how many are asked for, any index can be had at once, and the share of every source is exact to about
one sample. Where the next plan begins, its clock starts anew, while every source goes on with its own next sample: nothing of it is repeated or
skipped, also when it was away for a while; a new source starts at its first.

A plan may have windows that are left out (a run was rolled back because of them): its clock jumps over them, so what follows is what would have
followed, and samples are numbered as they are served, whatever is left out between them.

Owns: the schedule, what of it is left out, and what of a blend may change within a run. Refuses: weights that are not positive; a change that was
not asked for, one before a window that lies ahead, and any change of seed, sequence length, packing, or of the shards behind a source's name and
what of them is learnt. Knows nothing of documents and tokens.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prism.errors import UserError

Int64 = NDArray[np.int64]
Table = dict[str, Any]

OnChange = Literal["refuse", "replan"]

SMALLEST_SHARE = 1e-100
"""Far below one sample in any run, far above where due times leave the numbers."""


@dataclass(frozen=True)
class Segment:
    """A plan and the sample that it begins with; weights by source, in the order of the blend, which settles ties.

    skipped: windows (start, samples) of its own clock that are left out, counted from its beginning; in order, apart from each other.
    """

    first_sample: int
    weights: Mapping[str, float]
    skipped: tuple[tuple[int, int], ...] = ()

    def clock(self, served: int) -> int:
        """What its clock shows when `served` of its samples are served: windows that begin there are left behind too."""
        for start, samples in self.skipped:
            if start > served:
                break
            served += samples
        return served

    def pieces(self, low: int, high: int) -> list[tuple[int, int]]:
        """The spans of its clock that hold its samples [low, high), in order."""
        found, begin = [], self.clock(low)
        for start, samples in self.skipped:
            if begin < start and begin + high - low > start:
                found.append((begin, start))
                low, begin = low + start - begin, start
            if begin == start:
                begin += samples
        return [*found, (begin, begin + high - low)] if low < high else found


class Schedule:
    """The order of samples under one plan: which source is next. A pure function of the weights. Errors: UserError for bad weights."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]):
        for name, weight in zip(names, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of source {name!r} is {weight}, it must be a positive number; leave the source out to switch it off")
        try:
            total = math.fsum(float(weight) for weight in weights)
        except OverflowError:
            raise UserError(f"the weights {list(weights)} sum to more than a number holds; divide all of them by one number") from None
        self.weights = np.array([float(weight) / total for weight in weights])
        for name, weight in zip(names, self.weights.tolist(), strict=True):
            if weight < SMALLEST_SHARE:
                raise UserError(
                    f"source {name!r} has a share of {weight:.3g} of the samples, and would never be served; leave it out or raise its weight"
                )

    def counts(self, num_samples: int) -> Int64:
        """How many of the first `num_samples` samples come from each source: exact, shape [sources], in the time of one window."""
        before, due_at, source_of = self._window(num_samples, num_samples)
        taken = source_of[np.lexsort((source_of, due_at))][: num_samples - int(before.sum())]
        return before + np.bincount(taken, minlength=len(before))

    def between(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Which source serves the samples [start, stop), and which sample of that source each is: two arrays of stop - start."""
        before, due_at, source_of = self._window(start, stop)
        # Within a source the window holds consecutive samples in order, so a sample's ordinal is `before` plus its rank among its source's.
        first = np.concatenate([[0], np.cumsum(np.bincount(source_of, minlength=len(before)))[:-1]])
        ordinal_of = np.arange(len(source_of)) - first[source_of] + before[source_of]
        chosen = np.lexsort((source_of, due_at))[start - int(before.sum()) :][: stop - start]
        return source_of[chosen], ordinal_of[chosen]

    def _window(self, start: int, stop: int) -> tuple[Int64, NDArray[np.float64], Int64]:
        """All samples due in a span of time that surely holds those served as [start, stop).

        By time t source j has served w_j * t samples to within 1/2, so the blend has served t to within half the number of sources.
        Returns the samples of each source before the span; the due times in it, source by source; the source of each.
        """
        slack = len(self.weights) / 2 + 2
        before, until = self._due_by(start - slack), self._due_by(stop + slack)
        assert before.sum() <= start and until.sum() >= stop, (start, stop)
        source_of = np.repeat(np.arange(len(self.weights)), until - before)
        first = np.concatenate([[0], np.cumsum(until - before)[:-1]])
        ordinals = np.arange(len(source_of)) - first[source_of] + before[source_of]
        return before, self._due_time(ordinals, self.weights[source_of]), source_of

    @staticmethod
    def _due_time(ordinals: Int64, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return (ordinals + 0.5) / weights

    def _due_by(self, time: float) -> Int64:
        """Samples of each source with a due time <= time. The order is that of the rounded due times, so the count is corrected by them."""
        counts = np.maximum(np.floor(time * self.weights + 0.5), 0).astype(np.int64)
        while (late := (counts > 0) & (self._due_time(counts - 1, self.weights) > time)).any():
            counts -= late
        while (early := self._due_time(counts, self.weights) <= time).any():
            counts += early
        return counts


class History:
    """The plans of a run, one after another; the last has no end.

    names: every source that any of them has, in order of first appearance; sources are numbered by it. Errors: UserError for bad weights.
    """

    def __init__(self, segments: Sequence[Segment]):
        starts = [segment.first_sample for segment in segments]
        assert segments and starts[0] == 0 and all(before <= after for before, after in pairwise(starts)), starts
        self.segments = tuple(segments)
        self.names = list(dict.fromkeys(name for segment in segments for name in segment.weights))
        place = {name: number for number, name in enumerate(self.names)}
        self._starts = np.array(starts)
        self._schedules = [Schedule(list(segment.weights), list(segment.weights.values())) for segment in segments]
        self._places = [np.array([place[name] for name in segment.weights]) for segment in segments]
        self._served = [np.zeros(len(self.names), np.int64)]
        """samples of each source that were served before each segment"""
        self._passed = [np.zeros(len(self.names), np.int64)]
        """and with those that were left out: where each source's own stream stands"""
        for number in range(len(segments) - 1):
            self._passed.append(self._passed_in(number, starts[number + 1]))
            self._served.append(self._counts_in(number, starts[number + 1]))

    @property
    def current(self) -> Segment:
        """The last plan."""
        return self.segments[-1]

    def counts(self, num_samples: int) -> Int64:
        """How many of the first `num_samples` samples come from each source of `names`: exact."""
        return self._counts_in(self._segment(max(num_samples - 1, 0)), num_samples)

    def skipped(self, num_samples: int) -> Int64:
        """How many of each source were left out before sample `num_samples`."""
        return self._passed_in(self._segment(num_samples), num_samples) - self.counts(num_samples)

    def schedule(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Which source serves the samples [start, stop), and which sample of that source's own stream each is: two arrays of stop - start."""
        assert 0 <= start <= stop, (start, stop)
        parts = []
        for number in range(self._segment(start), len(self.segments)):
            begin = self.segments[number].first_sample
            end = self.segments[number + 1].first_sample if number + 1 < len(self.segments) else stop
            low, high = max(start, begin), min(stop, end)
            if low < high:
                for piece in self.segments[number].pieces(low - begin, high - begin):
                    local, ordinals = self._schedules[number].between(*piece)
                    sources = self._places[number][local]
                    parts.append((sources, ordinals + self._passed[number][sources]))
        sources, ordinals = (np.concatenate([part[column] for part in parts] or [np.zeros(0, np.int64)]) for column in (0, 1))
        return sources, ordinals

    def replanned(self, first_sample: int, weights: Mapping[str, float]) -> "History":
        """This history with another plan from `first_sample` on; a plan that began at that very sample served nothing and is forgotten."""
        assert first_sample >= self.current.first_sample, f"a plan beyond sample {first_sample} served samples already: {self.current}"
        kept = [segment for segment in self.segments if segment.first_sample < first_sample or segment.skipped]
        return History([*kept, Segment(first_sample, dict(weights))])

    def _segment(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _counts_in(self, number: int, num_samples: int) -> Int64:
        counts, schedule = self._served[number].copy(), self._schedules[number]
        for start, stop in self.segments[number].pieces(0, num_samples - self.segments[number].first_sample):
            counts[self._places[number]] += schedule.counts(stop) - schedule.counts(start)
        return counts

    def _passed_in(self, number: int, num_samples: int) -> Int64:
        segment, counts = self.segments[number], self._passed[number].copy()
        counts[self._places[number]] += self._schedules[number].counts(segment.clock(num_samples - segment.first_sample))
        return counts


class Continuation(NamedTuple):
    """How a run goes on over its data. records: the plans as a checkpoint keeps them; changes: what the last of them changed, in words."""

    records: list[Table]
    changes: list[str]

    @property
    def history(self) -> History:
        """The plans that decide the samples."""
        return from_records(self.records)


def from_records(records: Sequence[Table]) -> History:
    """The history that a checkpoint recorded: [{"first_sample", "sources": [{"name", "weight", "digest", "tokens"}]}].

    "skipped": [{"start", "samples", ...}] where windows of a plan are left out.
    """
    return History([_segment(record) for record in records])


def _segment(record: Table) -> Segment:
    windows = tuple((window["start"], window["samples"]) for window in record.get("skipped", ()))
    return Segment(record["first_sample"], {source["name"]: source["weight"] for source in record["sources"]}, windows)


def without_window(records: Sequence[Table], first_sample: int, samples: int, **facts: Any) -> list[Table]:
    """These plans without the samples [first_sample, first_sample + samples) that they serve, all of the last plan. facts: kept with the window."""
    last = records[-1]
    segment = _segment(last)
    assert samples > 0 and first_sample >= segment.first_sample, (first_sample, samples, segment)
    pieces = segment.pieces(first_sample - segment.first_sample, first_sample - segment.first_sample + samples)
    start, stop = pieces[0][0], pieces[-1][1]
    windows = [window for window in last.get("skipped", ()) if not start <= window["start"] < stop]  # those inside become part of it
    windows.append({"start": start, "samples": stop - start, **facts})
    return [*records[:-1], {**last, "skipped": sorted(windows, key=lambda window: int(window["start"]))}]


def recorded(data: Table) -> list[Table]:
    """The plans in a data fingerprint; one without a history (schema 1) had one plan."""
    return list(data.get("history") or [{"first_sample": 0, "sources": data["sources"]}])


def go_on(then: Table, now: Table, first_sample: int, on_change: OnChange) -> Continuation:
    """The plans of a run that goes on at `first_sample`; then: the data fingerprint of its checkpoint, now: that of the blend at hand.

    Weights, order and sources may change where on_change is "replan": a plan is added. Errors: UserError with every difference that is not allowed.
    """
    now = json.loads(json.dumps(now))  # as a checkpoint would give it back: no tuples
    records = recorded(then)
    records = [{**record, "sources": [_with_size(source, now) for source in record["sources"]]} for record in records]
    fixed, movable = _fixed_changes(then, now, records), _movable_changes(then["sources"], now["sources"])
    if fixed:
        raise UserError(
            "the data changed since the checkpoint in a way that no run can go on with:\n  "
            + "\n  ".join(fixed + movable)
            + "\nrestore it (new shards need a source name of their own), or start a new run from the checkpoint with model.load='weights'"
        )
    if not movable:
        return Continuation(records, [])
    if on_change == "refuse":
        raise UserError(
            "the data changed since the checkpoint, so samples would be lost or repeated:\n  "
            + "\n  ".join(movable)
            + f"\nrestore the blend; or set data.on_change='replan' to go on under the new one from sample {first_sample}, every source from where "
            "it stood; or start a new run from the checkpoint with model.load='weights'"
        )
    assert records[-1]["first_sample"] <= first_sample, (records[-1], first_sample)
    _refuse_windows_ahead(records[-1], first_sample)
    kept = [record for record in records if record["first_sample"] < first_sample or record.get("skipped")]
    return Continuation([*kept, {"first_sample": first_sample, "sources": now["sources"], "changes": movable}], movable)


def _refuse_windows_ahead(last: Table, first_sample: int) -> None:
    """Errors: UserError where the last plan leaves out samples that another one would serve in another order."""
    segment = _segment(last)
    now = segment.clock(first_sample - segment.first_sample)
    ahead = [start for start, _ in segment.skipped if start > now]
    if ahead:
        raise UserError(
            f"the run leaves out samples that lie {max(ahead) - now} samples ahead of it; under another blend they would come in another order: "
            "go on with the blend as it was until the run has passed them, and change it then"
        )


def consumption(records: Sequence[Table], num_samples: int, seq_len: int) -> dict[str, Table]:
    """What the first `num_samples` samples took of each source: samples, tokens (places, where packed), and epochs where its size is known. Exact."""
    history = from_records(records)
    sizes = {source["name"]: size_of(source, seq_len) for record in records for source in record["sources"]}
    found = {}
    for name, samples, skipped in zip(history.names, history.counts(num_samples).tolist(), history.skipped(num_samples).tolist(), strict=True):
        epochs = samples * seq_len / sizes[name] if sizes[name] else None
        found[name] = {"samples": samples, "tokens": samples * seq_len, "epochs": epochs} | ({"skipped": skipped} if skipped else {})
    return found


def describe_consumption(records: Sequence[Table], num_samples: int, seq_len: int) -> str:
    """What a run took of its sources beside the shares that its last plan has for them: a table of several lines."""
    weights = {source["name"]: source["weight"] for source in records[-1]["sources"]}
    unit = "places" if any("buffers" in source for record in records for source in record["sources"]) else "tokens"
    rows = [("source", "planned", "true", "samples", unit, "epochs")]
    for name, taken in consumption(records, num_samples, seq_len).items():
        planned = f"{weights[name] / math.fsum(weights.values()):.2%}" if name in weights else "left"
        epochs = "unknown" if taken["epochs"] is None else f"{taken['epochs']:.3g}"
        rows.append((name, planned, f"{taken['samples'] / max(num_samples, 1):.2%}", f"{taken['samples']:,}", f"{taken['tokens']:,}", epochs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    left_out = [f"{taken['skipped']:,} of {name}" for name, taken in consumption(records, num_samples, seq_len).items() if "skipped" in taken]
    return "\n".join(lines + ([f"left out: {', '.join(left_out)}"] if left_out else []))


def size_of(source: Table, seq_len: int) -> int | None:
    """What an epoch of a record's source is: its tokens, or the places of its buffers where documents are packed; None: not known."""
    if "buffers" not in source:
        return source.get("tokens")
    return source["buffers"] * seq_len if source["buffers"] else None


def _with_size(source: Table, now: Table) -> Table:
    """A record's source with its size, which older checkpoints do not tell."""
    same: Table = next((other for other in now["sources"] if other["name"] == source["name"]), {})
    return source | {key: same[key] for key in ("tokens", "buffers") if same.get(key) and not source.get(key)}


def _fixed_changes(then: Table, now: Table, records: Sequence[Table]) -> list[str]:
    """What may not change: everything but the sources, and the shards of a source that the run has ever read."""
    keys = [key for key in dict.fromkeys([*then, *now]) if key not in ("sources", "history", "bad_steps")]
    changes = [f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in keys if then.get(key) != now.get(key)]
    digests = {source["name"]: source["digest"] for record in records for source in record["sources"]}
    losses = {source["name"]: source.get("loss", "all") for record in records for source in record["sources"]}
    taught = {source["name"]: source.get("loss", "all") for source in now["sources"]}
    other = [name for name in taught if losses.get(name, taught[name]) != taught[name]]
    changes += [f"source {name}: loss was {losses[name]!r}, now {taught[name]!r}" for name in other]
    names = {digest: name for name, digest in digests.items()}
    changes += [
        f"source {source['name']} is {names[source['digest']]} under another name: its documents would be read again from the start"
        for source in now["sources"]
        if source["name"] not in digests and source["digest"] in names
    ]
    return changes + [
        f"source {source['name']}: digest was {digests[source['name']]!r}, now {source['digest']!r}"
        for source in now["sources"]
        if digests.get(source["name"], source["digest"]) != source["digest"] and source["name"] not in other
    ]


def _movable_changes(then: Sequence[Table], now: Sequence[Table]) -> list[str]:
    """What another plan allows: weights, sources that left or joined, and their order, which settles ties."""
    before, after = ({source["name"]: source["weight"] for source in sources} for sources in (then, now))
    changes = [f"source {name} is gone (its weight was {before[name]!r})" for name in before if name not in after]
    changes += [f"source {name} is new (weight {after[name]!r})" for name in after if name not in before]
    if before.keys() == after.keys() and list(before) != list(after):
        changes.append(f"the order of the sources was {list(before)}, now {list(after)}")
    return changes + [
        f"source {name}: weight was {before[name]!r}, now {after[name]!r}" for name in before if name in after and before[name] != after[name]
    ]
