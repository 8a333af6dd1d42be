"""Duplicates against known truths: planted copies, planted overlaps of known Jaccard similarity, components, any number of passes."""

import tracemalloc

import numpy as np
import pytest

from megatron_prism.data_prep.cleaning.columns import Columns, column_types
from megatron_prism.data_prep.cleaning.duplicates import (
    EXACT,
    FIXED_BYTES,
    KEPT,
    NEAR,
    PASS_BYTES,
    Corpus,
    find_duplicates,
    jaccard,
    join,
    number_of_passes,
)
from megatron_prism.data_prep.cleaning.scan import Plan, exact_hash, scan_texts
from megatron_prism.data_prep.inputs import Position
from megatron_prism.errors import UserError

PLAN = Plan(True, (5, 128, 16), None, False)
GIB = 2.0**30


def corpus_of(folder, texts, plan=PLAN, sources=1):
    """The texts scanned into the columns of so many sources, one after another."""
    made = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), sources)):
        columns, scanned = Columns(folder / str(number), column_types(plan)), scan_texts([texts[i] for i in part], plan)
        columns.append("code", scanned.code)
        for name, rows in (("exact", scanned.exact), ("low", scanned.low)):
            if rows is not None:
                columns.append(name, rows)
        for band in range(plan.near[2] if plan.near else 0):
            columns.append(f"band_{band:02d}", scanned.keys[:, band])
        columns.commit(Position(1, 0), True, None, 0)
        made.append(columns)
    return Corpus(made)


def sentence(generator, words):
    return [f"w{number}" for number in generator.integers(0, 50_000, words)]


def test_white_space_and_normal_form_are_no_difference_and_case_is():
    assert exact_hash("a  b\n\nc ") == exact_hash(" a b c") == exact_hash("a\tb\u2003c")
    assert exact_hash("caf\u00e9") == exact_hash("cafe\u0301")
    assert len({exact_hash(text) for text in ("a b", "A b", "ab", "a b.", "")}) == 5


def test_the_first_of_equal_texts_is_kept_over_sources_and_points_at_it(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 400, 1000)
    texts = [f"document {value}" + " " * (number % 3) for number, value in enumerate(values)]
    verdicts, same_as = find_duplicates(corpus_of(tmp_path, texts, PLAN._replace(near=None), sources=3), True, 0, 1.0, GIB)
    first = {int(value): number for number, value in reversed(list(enumerate(values)))}
    assert same_as.tolist() == [first[int(value)] for value in values]
    assert verdicts.tolist() == [KEPT if first[int(value)] == number else EXACT for number, value in enumerate(values)]


def with_jaccard(generator, shingles, shared):
    """Two texts of `shingles` word 5-grams together, `shared` of them in both: a common text, with an own ending each."""
    rest = shingles - shared
    common = sentence(generator, shared + 4)
    return " ".join(common + sentence(generator, rest // 2)), " ".join(common + sentence(generator, rest - rest // 2))


def shingle_set(text):
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize(("shared", "low", "high"), [(100, 0.0, 0.0), (140, 0.0, 0.1), (180, 0.97, 1.0), (190, 1.0, 1.0)])
def test_pairs_of_known_similarity_are_found_above_the_threshold_and_not_below(tmp_path, shared, low, high):
    """Jaccard 0.5, 0.7, 0.9, 0.95 at a threshold of 0.8: recall and precision, over 200 pairs of 200 shingles."""
    generator = np.random.default_rng(shared)
    pairs = [with_jaccard(generator, 200, shared) for _ in range(200)]
    left, right = shingle_set(pairs[0][0]), shingle_set(pairs[0][1])
    assert len(left & right) / len(left | right) == pytest.approx(shared / 200, abs=0.011)
    verdicts, same_as = find_duplicates(corpus_of(tmp_path, [text for pair in pairs for text in pair]), True, 16, 0.8, GIB)
    assert low <= (verdicts[1::2] == NEAR).mean() <= high
    assert (verdicts[::2] == KEPT).all()
    dropped = np.flatnonzero(verdicts == NEAR)
    assert (same_as[dropped] == dropped - 1).all()


def test_signatures_estimate_similarity_without_bias():
    generator = np.random.default_rng(3)
    for shared in (20, 100, 180):
        texts = [text for _ in range(300) for text in with_jaccard(generator, 200, shared)]
        low = scan_texts(texts, PLAN).low
        truth = shared / 200
        assert jaccard(low[::2], low[1::2]).mean() == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / 128 / 300) + 0.006)


def test_punctuation_and_case_are_no_difference_for_near_duplicates_and_texts_without_words_stay(tmp_path):
    generator = np.random.default_rng(1)
    text = " ".join(sentence(generator, 60))
    texts = [text, text.upper().replace(" ", ", "), "!!!", "???", "", "one two", "One, two!", "two one"]
    verdicts, same_as = find_duplicates(corpus_of(tmp_path, texts), True, 16, 0.8, GIB)
    assert verdicts.tolist() == [KEPT, NEAR, KEPT, KEPT, KEPT, KEPT, NEAR, KEPT]
    assert same_as.tolist() == [0, 0, 2, 3, 4, 5, 5, 7]


def test_a_chain_of_near_duplicates_is_one_component_and_its_first_stays(tmp_path):
    generator = np.random.default_rng(2)
    words = sentence(generator, 1000)
    chain = []
    for step in range(6):  # each differs from the one before in 5 % of its 5-grams
        words[step * 10 : step * 10 + 10] = sentence(generator, 10)
        chain.append(" ".join(words))
    order = [3, 0, 5, 1, 4, 2]
    texts = [" ".join(sentence(generator, 50)), *(chain[i] for i in order), chain[0]]
    verdicts, same_as = find_duplicates(corpus_of(tmp_path, texts), True, 16, 0.9, GIB)
    assert verdicts.tolist() == [KEPT, KEPT, *[NEAR] * 5, EXACT]
    assert same_as.tolist() == [0, *[1] * 6, 2]


def test_the_result_does_not_depend_on_the_number_of_passes_or_sources(tmp_path, monkeypatch):
    generator = np.random.default_rng(4)
    pairs = [with_jaccard(generator, 60, int(generator.integers(30, 60))) for _ in range(150)]
    texts = [text for pair in pairs for text in pair] + [pairs[number][0] for number in range(40)]
    texts = [texts[i] for i in generator.permutation(len(texts))]
    one = find_duplicates(corpus_of(tmp_path / "one", texts), True, 16, 0.8, GIB)
    monkeypatch.setattr("megatron_prism.data_prep.cleaning.duplicates.PAIRS_AT_ONCE", 7)
    passes = []
    memory = len(texts) * 30.0
    many = find_duplicates(corpus_of(tmp_path / "many", texts, sources=4), True, 16, 0.8, memory, lambda: passes.append(1))
    assert len(passes) == 17 * number_of_passes(len(texts), memory) == 17 * 6
    assert [part.tolist() for part in one] == [part.tolist() for part in many]
    assert {KEPT, EXACT, NEAR} == set(one[0].tolist())


@pytest.mark.parametrize(("room", "passes"), [(1.0, 1), (0.25, 4)])
def test_telling_duplicates_stays_within_the_memory_it_is_given(tmp_path, room, passes):
    count = 400_000
    columns = Columns(tmp_path, column_types(Plan(True, (5, 8, 1), None, False)))
    hashes = np.random.default_rng(0).integers(0, 1 << 64, (count, 2), dtype=np.uint64)
    hashes[1::10] = hashes[::10]
    low = hashes[:, 0].copy().view(np.uint8).reshape(count, 8)
    for name, rows in (("code", np.zeros(count)), ("exact", hashes), ("band_00", hashes[:, 0]), ("low", low)):
        columns.append(name, rows)
    columns.commit(Position(1, 0), True, None, 0)
    memory = (FIXED_BYTES + room * PASS_BYTES) * count
    assert number_of_passes(count, memory) == passes
    for exact in (True, False):
        tracemalloc.start()
        verdicts, _ = find_duplicates(Corpus([columns]), exact, int(not exact), 0.8, memory)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (verdicts > 0).sum() == count // 10
        assert peak < memory + 10_000_000


def test_too_little_memory_is_refused_with_the_number():
    assert number_of_passes(0, 1.0) == number_of_passes(1000, GIB) == 1
    assert number_of_passes(100_000_000, 4 * GIB) == 3
    with pytest.raises(UserError, match=r"memory_gib=4 is too little to tell the duplicates of 1,000,000,000 documents: 16\.83 GiB"):
        number_of_passes(1_000_000_000, 4 * GIB)


@pytest.mark.parametrize("seed", range(3))
def test_joining_pairs_gives_the_components_of_a_plain_search(seed):
    generator = np.random.default_rng(seed)
    edges = generator.integers(0, 300, (250, 2))
    same_as = np.arange(300, dtype=np.int64)
    for part in np.array_split(edges, 7):
        join(same_as, part[:, 0], part[:, 1])
    expected = list(range(300))
    for _ in range(300):
        for a, b in edges.tolist():
            expected[a] = expected[b] = min(expected[a], expected[b])
    roots = same_as.copy()
    while (roots != same_as[roots]).any():
        roots = same_as[roots]
    assert roots.tolist() == expected


def test_columns_go_on_at_the_last_finished_unit_and_a_short_file_is_refused(tmp_path):
    types = {"code": ("u1", 1), "exact": ("u8", 2)}
    columns = Columns(tmp_path, types)
    columns.append("code", np.arange(5))
    columns.append("exact", np.arange(10).reshape(5, 2))
    columns.commit(Position(0, 50), False, "ab", 7)
    columns.append("code", np.arange(3))
    columns.close()  # as a kill leaves it: rows without a journal line, and half a journal line
    with (tmp_path / "journal.jsonl.tmp").open("ab") as journal:
        journal.write(b'{"end": [1,')
    again = Columns(tmp_path, types)
    assert (again.state.end, again.documents, again.state.digest, again.state.lines) == (Position(0, 50), 5, "ab", 7)
    again.append("code", np.arange(2))
    again.append("exact", np.arange(4).reshape(2, 2))
    again.commit(Position(1, 0), True, None, 0)
    assert again.read("code").tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert again.read("exact")[5:].tolist() == [[0, 1], [2, 3]]
    again.close()
    (tmp_path / "exact.tmp").write_bytes(b"short")
    with pytest.raises(UserError, match="shorter than the 112 bytes of its journal"):
        Columns(tmp_path, types)
