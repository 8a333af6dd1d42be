"""Where the points of a landscape lie, and what they are made of."""

from megatron_prism.analysis.landscape import Place, grid, on_path, path_positions


def test_positions_of_the_path_and_shares_of_the_models():
    assert path_positions(3, 2) == [0.0, 0.5, 1.0, 1.5, 2.0] and path_positions(2, 1) == [0.0, 1.0]
    assert [on_path(position) for position in (-0.5, 0, 0.3, 1, 1.25, 2, 3)] == [
        (-0.5, 0), (0, 0), (0.3, 0), (1, 0), (1, 0.25), (1, 1), (1, 2),
    ]  # fmt: skip
    assert Place.of(0, 0).weights == (1, 0, 0) and Place.of(1, 0).weights == (0, 1, 0) and Place.of(1, 1).weights == (0, 0, 1)
    assert Place.of(0.1 + 0.2, -0.0) == (0.3, 0.0) and Place.of(1.5, -0.25).weights == (-0.5, 1.75, -0.25)
    assert grid([0, 1], [0, 0.5]) == [[(0, 0), (1, 0)], [(0, 0.5), (1, 0.5)]]
