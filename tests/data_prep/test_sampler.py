"""The sample stream against a plain reference: documents laid end to end, samples sorted by due time."""

import itertools

import numpy as np
import pytest

from megatron_prism.data_prep import sampler as sampler_module
from megatron_prism.data_prep.sampler import Sampler, document_order
from megatron_prism.errors import UserError

FIRST_ORDER = [9, 0, 7, 1, 8, 4, 6, 2, 3, 5]  # as first drawn; a change would reshuffle every run in progress


def stream(lengths, seed, name, num_tokens):
    """(document, offset) of the first tokens of a source, one by one."""
    tokens, epoch = [], 0
    while len(tokens) < num_tokens:
        for document in document_order(len(lengths), seed, name, epoch):
            tokens += [(int(document), offset) for offset in range(lengths[document])]
        epoch += 1
    return tokens[:num_tokens]


def flat(spans):
    return [(span.document, offset) for span in spans for offset in range(span.offset, span.offset + span.length)]


def reference_order(weights, num_samples):
    """Sort far more due times than are needed; (source, ordinal) of the first ones."""
    weights = np.array(weights) / np.sum(weights)
    due = [((n + 0.5) / weight, source, n) for source, weight in enumerate(weights) for n in range(int(num_samples * weight) + len(weights) + 3)]
    return [(source, n) for _, source, n in sorted(due)][:num_samples]


def random_case(number):
    generator = np.random.default_rng(number)
    num_sources = int(generator.integers(1, 6))
    lengths = [generator.integers(1, 30, generator.integers(1, 12)).astype(np.int32) for _ in range(num_sources)]
    weights = (generator.random(num_sources) ** 3 + 1e-3).tolist()
    return lengths, weights, int(generator.integers(1, 40)), int(generator.integers(0, 2**40))


@pytest.mark.parametrize("number", range(12))
def test_samples_are_the_slices_of_each_source_laid_end_to_end_in_order_of_due_time(number):
    lengths, weights, seq_len, seed = random_case(number)
    sampler = Sampler(lengths, weights, seq_len, seed)
    expected_order = reference_order(weights, 60)
    streams = [stream(part, seed, str(source), 61 * seq_len + 1) for source, part in enumerate(lengths)]
    for index, (source, ordinal) in enumerate(expected_order):
        sample = sampler.sample(index)
        assert sample.source == source
        assert flat(sample.spans) == streams[source][ordinal * seq_len : (ordinal + 1) * seq_len + 1]
        assert sum(span.length for span in sample.spans) == seq_len + 1


@pytest.mark.parametrize("number", range(6))
def test_random_access_equals_sequential_reading(number, monkeypatch):
    monkeypatch.setattr(sampler_module, "SCHEDULE_BLOCK", 7)
    lengths, weights, seq_len, seed = random_case(number)
    sequential = [Sampler(lengths, weights, seq_len, seed).sample(index) for index in range(100)]
    shuffled = np.random.default_rng(0).permutation(100)
    sampler = Sampler(lengths, weights, seq_len, seed)
    assert {int(index): sampler.sample(int(index)) for index in shuffled} == dict(enumerate(sequential))


def test_the_schedule_of_any_window_is_the_same_as_that_of_the_whole():
    sampler = Sampler([np.array([5])] * 3, [0.7, 0.2, 0.1], 4, 0)
    sources, ordinals = sampler.schedule(0, 500)
    for start, stop in [(0, 1), (13, 14), (17, 333), (499, 500), (20, 20)]:
        part = sampler.schedule(start, stop)
        assert part[0].tolist() == sources[start:stop].tolist() and part[1].tolist() == ordinals[start:stop].tolist()


@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1], [1e-6, 1.0], [55, 27.5, 13.75, 3, 0.75], list(np.arange(1, 301) ** 2.0)])
def test_counts_are_exact_and_shares_are_right_to_about_one_sample(weights):
    sampler = Sampler([np.array([9])] * len(weights), weights, 4, 3)
    sources, ordinals = sampler.schedule(0, 3000)
    shares = np.array(weights) / np.sum(weights)
    for total in [0, 1, 2, 17, 1000, 2999, 3000]:
        counts = sampler.counts(total)
        assert counts.tolist() == np.bincount(sources[:total], minlength=len(weights)).tolist()
        assert counts.sum() == total
        # a source has served w*t by time t to within 1/2; t is the number of samples to within half the sources
        assert np.all(np.abs(counts - shares * total) <= 0.5 + shares * (len(weights) / 2 + 1))
    for source in range(len(weights)):
        assert ordinals[sources == source].tolist() == list(range(int((sources == source).sum())))


def test_counts_far_out_are_exact_for_extreme_weights():
    sampler = Sampler([np.array([9]), np.array([9])], [1e-6, 1.0], 4, 3)
    total = 10**12
    counts = sampler.counts(total)
    assert counts.sum() == total
    assert abs(counts[0] - total * 1e-6 / (1 + 1e-6)) <= 1
    sources, ordinals = sampler.schedule(total, total + 5)
    assert ordinals[sources == 1][0] == counts[1]
    assert sampler.counts(total + 5).tolist() == (counts + np.bincount(sources, minlength=2)).tolist()


def test_every_document_is_served_whole_once_per_epoch_and_in_another_order_each_time():
    lengths = np.random.default_rng(1).integers(1, 50, 200).astype(np.int32)
    seq_len, total = 16, int(lengths.sum())
    sampler = Sampler([lengths], [1.0], seq_len, 5)
    tokens = [token for ordinal in range(3 * total // seq_len + 1) for token in flat(sampler.spans(0, ordinal))[:seq_len]]
    orders = []
    for epoch in range(3):
        part = tokens[epoch * total : (epoch + 1) * total]
        assert sorted(part) == [(document, offset) for document in range(200) for offset in range(lengths[document])]
        orders.append([document for document, offset in part if offset == 0])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(200))


def test_the_last_token_of_a_sample_is_the_first_of_the_next():
    sampler = Sampler([np.array([3, 8, 1, 20])], [1.0], 6, 1)
    samples = [flat(sampler.spans(0, ordinal)) for ordinal in range(40)]
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(samples))


def test_a_one_document_source_shorter_than_a_sample_repeats():
    sampler = Sampler([np.array([3])], [1.0], 7, 1)
    assert flat(sampler.sample(0).spans) == [(0, n % 3) for n in range(8)]
    assert flat(sampler.sample(5).spans) == [(0, n % 3) for n in range(35, 43)]


def test_documents_without_tokens_are_stepped_over():
    sampler = Sampler([np.array([0, 4, 0, 0, 5, 0])], [1.0], 4, 1)
    spans = [span for ordinal in range(20) for span in sampler.spans(0, ordinal)]
    assert {span.document for span in spans} == {1, 4} and all(span.length for span in spans)


def test_the_order_of_documents_is_a_permutation_fixed_for_all_platforms():
    assert document_order(10, 1234, "prose", 0).tolist() == FIRST_ORDER
    assert sorted(document_order(1000, 7, "a", 3).tolist()) == list(range(1000))
    assert document_order(1000, 7, "a", 3).tolist() != document_order(1000, 7, "b", 3).tolist()
    assert document_order(1000, 7, "a", 3).tolist() != document_order(1000, 8, "a", 3).tolist()


def test_a_source_keeps_its_order_when_another_joins_the_blend():
    lengths = [np.arange(1, 30), np.arange(1, 50)]
    alone = Sampler(lengths[1:], [1.0], 8, 3, names=["b"])
    joined = Sampler(lengths, [0.5, 0.5], 8, 3, names=["a", "b"])
    assert [alone.spans(0, n) for n in range(30)] == [joined.spans(1, n) for n in range(30)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([np.array([4])], [0.0], 4, 0), "weight of source '0' is 0.0"),
        (([np.array([4])], [float("nan")], 4, 0), "positive number"),
        (([np.array([4])], [-1.0], 4, 0), "positive number"),
        (([np.array([4])], [1.0, 2.0], 4, 0), "one weight"),
        (([], [], 4, 0), "at least|one weight"),
        (([np.array([], dtype=int)], [1.0], 4, 0), "no tokens"),
        (([np.array([4])], [1.0], 0, 0), "seq_len=0"),
        (([np.array([4])] * 2, [1.0, 1.0], 4, 0, ["a", "a"]), "must differ"),
    ],
)
def test_impossible_blends_are_refused_with_the_reason(arguments, words):
    with pytest.raises(UserError, match=words):
        Sampler(*arguments)
