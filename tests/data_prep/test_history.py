"""Plans one after another: the samples of each source go on, whatever the weights were before."""

import numpy as np
import pytest

from megatron_prism.data_prep.history import (
    Continuation,
    History,
    Schedule,
    Segment,
    consumption,
    describe_consumption,
    from_records,
    go_on,
    recorded,
    without_window,
)
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.errors import UserError

CHANGING = [
    Segment(0, {"a": 3.0, "b": 1.0}),
    Segment(40, {"a": 1.0, "b": 1.0, "c": 2.0}),  # c joins
    Segment(41, {"c": 1e-6, "a": 1.0}),  # b leaves; a change after one sample; an extreme weight
    Segment(100, {"b": 5.0, "c": 2.0, "a": 3.0}),  # b comes back, another order
    Segment(177, {"c": 1.0}),
]
LENGTHS = {"a": [7, 1, 12, 30], "b": [3], "c": [5, 0, 9]}


def by_brute_force(segments, num_samples):
    """(name, ordinal) of the first samples: far more due times than needed are sorted in every segment, a counter for each source runs on."""
    found, served = [], dict.fromkeys("abc", 0)
    ends = [segment.first_sample for segment in segments[1:]] + [num_samples]
    for segment, end in zip(segments, ends, strict=True):
        weights = np.array(list(segment.weights.values())) / sum(segment.weights.values())
        count = end - segment.first_sample
        due = [((n + 0.5) / weight, place) for place, weight in enumerate(weights) for n in range(int(count * weight) + len(weights) + 3)]
        for _, place in sorted(due)[:count]:
            name = list(segment.weights)[place]
            found.append((name, served[name]))
            served[name] += 1
    return found


def named(history, start, stop):
    sources, ordinals = history.schedule(start, stop)
    return [(history.names[source], int(ordinal)) for source, ordinal in zip(sources, ordinals, strict=True)]


def test_every_window_of_a_history_is_that_of_the_brute_force_truth():
    truth, history = by_brute_force(CHANGING, 300), History(CHANGING)
    assert history.names == ["a", "b", "c"]
    for start, stop in [(0, 300), (0, 40), (39, 42), (40, 41), (99, 101), (150, 250), (176, 178), (299, 300), (60, 60)]:
        assert named(history, start, stop) == truth[start:stop], (start, stop)
    for total in [0, 1, 40, 41, 42, 100, 101, 177, 299]:
        assert history.counts(total).tolist() == [sum(name == wanted for name, _ in truth[:total]) for wanted in history.names]


def test_samples_of_a_history_are_the_slices_of_each_source_laid_end_to_end_at_any_index():
    names, seq_len = ["c", "a", "b"], 8  # the sampler's own order of sources is free
    sampler = Sampler([np.array(LENGTHS[name]) for name in names], History(CHANGING), seq_len, 5, names)
    alone = {name: Sampler([np.array(LENGTHS[name])], [1.0], seq_len, 5, [name]) for name in names}
    truth = by_brute_force(CHANGING, 260)
    for index in np.random.default_rng(0).permutation(260).tolist():
        sample, (name, ordinal) = sampler.sample(index), truth[index]
        assert names[sample.source] == name and sample.spans == alone[name].spans(0, ordinal)
    assert sampler.counts(260).tolist() == [sum(name == wanted for name, _ in truth) for wanted in names]


def test_a_source_that_left_is_counted_and_numbered_last_but_not_served():
    history = History(CHANGING[:3])
    sampler = Sampler([np.array(LENGTHS[name]) for name in ("c", "a")], history, 8, 5, ["c", "a"])
    assert sampler.names == ["c", "a", "b"]
    assert sampler.counts(200).sum() == 200 and sampler.counts(200)[2] == sampler.counts(41)[2] > 0
    both = Sampler([np.array(LENGTHS[name]) for name in ("c", "a", "b")], history, 8, 5, ["c", "a", "b"])
    assert [sampler.sample(index) for index in range(41, 200)] == [both.sample(index) for index in range(41, 200)]
    left = next(index for index in range(41) if both.sample(index).source == 2)
    with pytest.raises(UserError, match="'b' left the blend"):
        sampler.sample(left)


def test_a_history_of_one_plan_is_that_plan():
    plain = Sampler([np.array([5, 9]), np.array([4])], [3, 1], 4, 7, ["a", "b"])
    followed = Sampler([np.array([5, 9]), np.array([4])], History([Segment(0, {"a": 3, "b": 1})]), 4, 7, ["a", "b"])
    assert [plain.sample(index) for index in range(100)] == [followed.sample(index) for index in range(100)]


def test_following_a_longer_history_changes_nothing_before_its_last_plan():
    history = History(CHANGING[:2])
    sampler = Sampler([np.array(LENGTHS[name]) for name in "abc"], history, 8, 5, list("abc"))
    before = [sampler.sample(index) for index in range(80)]
    sampler.follow(history.replanned(60, {"a": 1.0, "b": 9.0, "c": 1.0}))
    after = [sampler.sample(index) for index in range(80)]
    assert after[:60] == before[:60] and after[60:] != before[60:]


WINDOWS = {0: ((0, 3), (9, 2), (11, 4)), 3: ((0, 5), (30, 1)), 4: ((6, 10**4),)}
"""by plan of CHANGING: one at its beginning, two side by side, one of a single sample, one that lies ahead of what is asked for at first"""


def with_windows_by_brute_force(num_samples):
    """(name, ordinal) of what is served, and the names of what is left out before sample `num_samples`."""
    found, left_out, passed = [], [], dict.fromkeys("abc", 0)
    ends = [segment.first_sample for segment in CHANGING[1:]] + [num_samples]
    for number, (segment, end) in enumerate(zip(CHANGING, ends, strict=True)):
        count, windows = end - segment.first_sample, WINDOWS.get(number, ())
        alone = by_brute_force([Segment(0, segment.weights)], count + sum(samples for _, samples in windows))
        for clock, (name, _) in enumerate(alone):
            skipped = any(start <= clock < start + samples for start, samples in windows)
            if not skipped and len(found) == end:
                break
            (left_out if skipped else found).append(name if skipped else (name, passed[name]))
            passed[name] += 1
    return found, left_out


def test_windows_are_left_out_and_what_follows_is_what_would_have_followed():
    history = History([Segment(segment.first_sample, segment.weights, WINDOWS.get(number, ())) for number, segment in enumerate(CHANGING)])
    truth, _ = with_windows_by_brute_force(300)
    for start, stop in [(0, 300), (0, 40), (6, 7), (39, 42), (99, 101), (128, 132), (170, 290), (183, 184), (60, 60)]:
        assert named(history, start, stop) == truth[start:stop], (start, stop)
    for total in [1, 6, 7, 40, 41, 100, 129, 130, 177, 182, 183, 299]:
        served, left_out = with_windows_by_brute_force(total) if total > 177 else (truth[:total], None)
        assert history.counts(total).tolist() == [sum(name == wanted for name, _ in served) for wanted in history.names], total
        if left_out is not None:
            assert history.skipped(total).tolist() == [left_out.count(name) for name in history.names], total


def test_a_window_is_counted_in_the_samples_that_are_served_and_takes_in_those_within_it():
    records = [{"first_sample": 0, "sources": data(FIRST)["sources"]}, {"first_sample": 10, "sources": data(FIRST)["sources"]}]
    whole = named(from_records(records), 0, 200)
    once = without_window(records, 30, 8, because="a spike")
    assert once[-1]["skipped"] == [{"start": 20, "samples": 8, "because": "a spike"}] and "skipped" not in records[-1]
    assert named(from_records(once), 0, 150) == whole[:30] + whole[38:158]
    twice = without_window(without_window(once, 60, 4), 26, 10)  # the first lies within the third
    assert [(window["start"], window["samples"]) for window in twice[-1]["skipped"]] == [(16, 18), (58, 4)]
    assert named(from_records(twice), 0, 100) == whole[:26] + whole[44:68] + whole[72:122]
    taken = consumption(twice, 60, 8)
    assert sum(one["samples"] for one in taken.values()) == 60 and sum(one.get("skipped", 0) for one in taken.values()) == 22
    assert describe_consumption(twice, 60, 8).splitlines()[-1].startswith("left out: ")
    assert "left out" not in describe_consumption(twice, 20, 8)


def test_another_plan_waits_until_the_windows_are_passed_and_counts_them():
    then = data(FIRST)
    then["history"] = without_window(recorded(then), 20, 6)
    with pytest.raises(UserError, match=r"leaves out samples that lie 10 samples ahead .* until the run has passed them"):
        go_on(then, data({"code": FIRST["code"]}), 10, "replan")
    records = go_on(then, data({"code": FIRST["code"]}), 20, "replan").records
    before = History([Segment(0, {"code": 3.0, "math": 1.0})])
    assert [record["first_sample"] for record in records] == [0, 20]
    assert named(from_records(records), 20, 21) == [("code", int(before.counts(26)[0]))], "what was left out does not come again"


def test_a_plan_that_served_nothing_is_replaced():
    history = History(CHANGING[:2]).replanned(40, {"b": 1.0})
    assert [(segment.first_sample, segment.weights) for segment in history.segments] == [(0, {"a": 3.0, "b": 1.0}), (40, {"b": 1.0})]
    assert History(CHANGING[:1]).replanned(0, {"c": 1.0}).names == ["c"]
    with pytest.raises(AssertionError):
        History(CHANGING).replanned(120, {"b": 1.0})


@pytest.mark.parametrize(
    ("weights", "words"), [([1e308, 1e308], "sum to more than a number holds"), ([1.0, 1e-200], "'1' has a share of 1e-200 .* never be served")]
)
def test_weights_beyond_numbers_are_refused(weights, words):
    with pytest.raises(UserError, match=words):
        Schedule(["0", "1"], weights)
    assert Schedule(["0", "1"], [1.0, 1e-90]).counts(10**9).tolist() == [10**9, 0]


def test_hundreds_of_sources_with_extreme_weights_are_counted_exactly_over_a_change():
    generator = np.random.default_rng(1)
    weights = {f"s{number}": float(10 ** generator.uniform(-6, 0)) for number in range(400)}
    other = {name: float(10 ** generator.uniform(-6, 0)) for name in list(weights)[::-2]}
    history = History([Segment(0, weights), Segment(5000, other), Segment(10**12, weights)])
    sources, ordinals = history.schedule(0, 9000)
    assert history.counts(9000).tolist() == np.bincount(sources, minlength=400).tolist()
    for source in range(400):
        assert ordinals[sources == source].tolist() == list(range(int((sources == source).sum())))
    far = history.counts(10**12 + 7)
    assert far.sum() == 10**12 + 7
    shares = np.array([other.get(name, 0.0) for name in history.names]) / sum(other.values())
    assert np.abs(history.counts(10**12) - history.counts(5000) - shares * (10**12 - 5000)).max() < 2 + len(other) / 2 * shares.max()


def data(sources, **changes):
    """A data fingerprint; sources: name -> (weight, digest, tokens)."""
    listed = [dict(zip(("name", "weight", "digest", "tokens"), (name, *rest), strict=True)) for name, rest in sources.items()]
    return {"seed": 1, "seq_len": 8, "mask_end_of_document": False, "sources": listed, **changes}


FIRST = {"code": (3.0, "x", 800), "math": (1.0, "y", 80)}


def test_unchanged_data_goes_on_under_the_plans_that_were_recorded():
    assert go_on(data(FIRST), data(FIRST), 100, "refuse") == Continuation([{"first_sample": 0, "sources": data(FIRST)["sources"]}], [])


def test_what_was_taken_stands_beside_what_the_last_plan_wants():
    left = {"gone": (1.0, "z", None), **FIRST}
    records = [{"first_sample": 0, "sources": data(left)["sources"]}, {"first_sample": 50, "sources": data(FIRST)["sources"]}]
    taken = consumption(records, 100, 8)
    lines = [line.split("  ") for line in describe_consumption(records, 100, 8).splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["source", "planned", "true", "samples", "tokens", "epochs"],
        ["gone", "left", "10.00%", "10", "80", "unknown"],
        ["code", "75.00%", f"{taken['code']['samples']}.00%", str(taken["code"]["samples"]), str(8 * taken["code"]["samples"]), "0.68"],
        ["math", "25.00%", f"{taken['math']['samples']}.00%", str(taken["math"]["samples"]), str(8 * taken["math"]["samples"]), "2.2"],
    ]


def test_a_schema_1_fingerprint_is_a_history_of_one_plan_whose_sizes_are_filled_in():
    old = data(FIRST)
    for source in old["sources"]:
        del source["tokens"]
    assert [record["first_sample"] for record in recorded(old)] == [0]
    records = go_on(old, data(FIRST), 100, "refuse").records
    assert consumption(records, 100, 8)["math"] == {"samples": 25, "tokens": 200, "epochs": 2.5}
    assert consumption(recorded(old), 100, 8)["math"]["epochs"] is None


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({**FIRST, "math": (2.0, "y", 80)}, ["source math: weight was 1.0, now 2.0"]),
        ({"math": FIRST["math"]}, ["source code is gone (its weight was 3.0)"]),
        ({**FIRST, "prose": (0.5, "z", 9)}, ["source prose is new (weight 0.5)"]),
        ({"math": FIRST["math"], "code": FIRST["code"]}, ["the order of the sources was ['code', 'math'], now ['math', 'code']"]),
    ],
)
def test_another_mix_is_refused_exactly_unless_it_is_asked_for(sources, words):
    with pytest.raises(UserError) as refusal:
        go_on(data(FIRST), data(sources), 100, "refuse")
    assert all(word in str(refusal.value) for word in [*words, "data.on_change='replan'", "from sample 100"])
    continuation = go_on(data(FIRST), data(sources), 100, "replan")
    assert continuation.changes == words
    assert [record["first_sample"] for record in continuation.records] == [0, 100]
    assert continuation.records[-1]["sources"] == data(sources)["sources"]
    again = data(sources, history=continuation.records)
    assert go_on(again, data(sources), 150, "replan") == Continuation(continuation.records, [])


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (data(FIRST, seed=2), "seed was 1, now 2"),
        (data(FIRST, seq_len=16), "seq_len was 8, now 16"),
        (data(FIRST, mask_end_of_document=True), "mask_end_of_document was False, now True"),
        (data(FIRST, packing={"pad_multiple": 4}), "packing was None, now {'pad_multiple': 4}"),
        (data({**FIRST, "math": (1.0, "other", 80)}), "source math: digest was 'y', now 'other'"),
        (data({**FIRST, "math": (9.0, "other", 80)}), "source math: weight was 1.0, now 9.0"),
        (data({"code": FIRST["code"], "maths": (1.0, "y", 80)}), "source maths is math under another name"),
    ],
)
def test_what_no_plan_may_change_is_refused_by_name(now, words):
    for on_change in ("refuse", "replan"):
        with pytest.raises(UserError, match="no run can go on with") as refusal:
            go_on(data(FIRST), now, 100, on_change)
        assert words in str(refusal.value)


def test_a_source_that_comes_back_must_bring_the_shards_that_it_left_with():
    without = {"code": FIRST["code"]}
    records = go_on(data(FIRST), data(without), 100, "replan").records
    then = data(without, history=records)
    with pytest.raises(UserError, match="source math: digest was 'y', now 'new'"):
        go_on(then, data({**without, "math": (1.0, "new", 80)}), 140, "replan")
    records = go_on(then, data(FIRST), 140, "replan").records
    history = from_records(records)
    assert [segment.first_sample for segment in history.segments] == [0, 100, 140]
    assert named(history, 140, 150).count(("math", 25)) == 1
    assert consumption(records, 144, 8)["math"] == {"samples": 26, "tokens": 208, "epochs": 2.6}
