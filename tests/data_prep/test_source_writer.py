"""Which documents are held out is a function of seed, source and position."""

import numpy as np
import pytest

from megatron_prism.data_prep.source_writer import held_out

FIRST_HELD_OUT = [8, 25, 65, 73, 104, 120, 180, 185, 199]


def test_the_held_out_documents_do_not_depend_on_how_they_are_cut():
    whole = held_out(3, "a", 0, 5000, 0.1)
    parts = np.concatenate([held_out(3, "a", start, min(333, 5000 - start), 0.1) for start in range(0, 5000, 333)])
    assert (whole == parts).all()


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_the_share_is_the_fraction_to_four_standard_deviations(fraction):
    count = held_out(1, "a", 0, 400_000, fraction).sum()
    assert abs(count - 400_000 * fraction) < 4 * np.sqrt(400_000 * fraction * (1 - fraction))
    assert not held_out(1, "a", 0, 1000, 0.0).any()


def test_seeds_and_sources_hold_out_different_documents_and_larger_fractions_more_of_the_same():
    base = held_out(1, "a", 0, 2000, 0.1)
    assert (base != held_out(2, "a", 0, 2000, 0.1)).any() and (base != held_out(1, "b", 0, 2000, 0.1)).any()
    assert (held_out(1, "a", 0, 2000, 0.2) >= base).all()


def test_the_first_held_out_documents_are_fixed_for_all_time():
    assert np.flatnonzero(held_out(1234, "prose", 0, 200, 0.05)).tolist() == FIRST_HELD_OUT
