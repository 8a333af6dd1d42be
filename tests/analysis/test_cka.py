"""Linear CKA: its identities, and the formula in float64 as it is written."""

import numpy as np
import pytest

from megatron_prism.analysis import cka


def written_out(x, y, centred=True):
    """||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), element by element in float64."""
    x, y = (values.astype(np.float64) - (values.astype(np.float64).mean(axis=0) if centred else 0.0) for values in (x, y))
    shared, own, other = (
        sum(float(a[:, i] @ b[:, j]) ** 2 for i in range(a.shape[1]) for j in range(b.shape[1])) for a, b in ((y, x), (x, x), (y, y))
    )
    return shared / np.sqrt(own * other)


def states(inputs=30, width=12, seed=0, dtype=np.float32):
    """Inputs that differ in a few directions far more than in the others, off the origin, as hidden states do."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((inputs, width)) * np.geomspace(5, 0.1, width) + generator.standard_normal(width) * 3).astype(dtype)


def rotation(width, seed=7):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


def of(x, y, centred=True):
    return cka.linear_cka(cka.layer(x, centred), cka.layer(y, centred))


SHAPES = pytest.mark.parametrize("width", [5, 12, 80], ids=["products of columns", "both", "products of inputs"])


@SHAPES
@pytest.mark.parametrize("centred", [True, False])
def test_it_is_the_formula_in_float64(width, centred):
    x, y = states(30, width), states(30, width + 3, seed=1)
    y[:, :3] += x[:, :3]
    assert of(x, y, centred) == pytest.approx(written_out(x, y, centred), rel=1e-13)
    draws = cka.draw(30, 11, 4, seed=3)
    found = cka.compare(cka.layer(x, centred), cka.layer(y, centred), draws)
    assert found.draws == pytest.approx([written_out(x[chosen], y[chosen], centred) for chosen in draws], rel=1e-12)
    assert found.cka == of(x, y, centred)


@SHAPES
@pytest.mark.parametrize("centred", [True, False])
def test_a_representation_against_itself_is_exactly_1(width, centred):
    x = states(30, width)
    found = cka.compare(cka.layer(x, centred), cka.layer(x.copy(), centred), cka.draw(30, 10, 20, seed=0))
    assert found.cka == 1.0 and set(found.draws) == {1.0}
    assert found.shuffled < 1.0


@SHAPES
def test_rotation_scale_and_a_shift_change_nothing_and_a_stretch_does(width):
    x = states(30, width, dtype=np.float64)
    assert of(x, 37.5 * x @ rotation(width) + 4) == pytest.approx(1.0, abs=1e-12)
    assert of(x, x @ rotation(width) * 1e-30) == pytest.approx(1.0, abs=1e-12), "nothing underflows"
    assert of(x * 1e30, x) == pytest.approx(1.0, abs=1e-12)
    assert of(x, x * np.geomspace(1, 50, width)) < 0.9
    assert of(x, x + 4, centred=False) < 1 - 1e-3, "the uncentred form sees a shift"


def test_a_permutation_of_one_sides_inputs_destroys_it():
    x = states(200, 8)
    permuted = x[np.random.default_rng(1).permutation(200)]
    assert of(x, permuted) < 0.05
    found = cka.compare(cka.layer(x), cka.layer(x), cka.draw(200, 100, 20, seed=0))
    assert found.shuffled < 0.1


def test_all_inputs_alike_have_no_figure():
    x, same = states(20, 6), np.repeat(states(1, 6) * 1000, 20, axis=0)
    assert of(x, same) is None and of(same, x) is None and of(same, same) is None
    rounded = same + np.random.default_rng(0).choice([0, 1], same.shape).astype(np.float32) * np.spacing(same)
    assert of(x, rounded) is None, "a unit in the last place is no difference of inputs"
    assert of(x, np.zeros_like(x), centred=False) is None
    few = np.zeros_like(x)
    few[0, 0] = 1.0
    assert of(x, few) is not None
    assert cka.compare(cka.layer(x), cka.layer(few), cka.draw(20, 5, 4, seed=0)) is None, "a draw without the one input that differs"


def test_a_draw_has_no_input_twice_and_is_the_same_for_every_layer():
    draws = cka.draw(200, 100, 20, seed=1234)
    assert draws.shape == (20, 100) and all(len(set(chosen)) == 100 for chosen in draws)
    assert np.array_equal(draws, cka.draw(200, 100, 20, seed=1234)) and not np.array_equal(draws, cka.draw(200, 100, 20, seed=1))
    assert np.array_equal(draws[:5], cka.draw(200, 100, 5, seed=1234)), "more draws leave the first ones as they were"


def test_the_least_layer_is_that_of_the_means_and_each_draw_has_its_own():
    layers = [cka.Alike(0.9, np.array([0.9, 0.7]), 0.1), None, cka.Alike(0.8, np.array([0.6, 0.9]), 0.1)]
    place, minima = cka.minimum(layers)
    assert place == 2 and minima.tolist() == [0.6, 0.7]
    assert cka.minimum([None, None]) is None
