"""Maps of cells as pictures."""

import re
from itertools import pairwise

from megatron_prism.analysis import heatmap


def test_the_steps_of_the_colour_bar_reach_below_each_other_and_end_together():
    """Edges that only meet leave hairlines where the page scales the picture."""
    boxes = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', "".join(heatmap.scale(0, 0, 0.0, 1.0)))
    spans = [(float(x), float(x) + float(width)) for x, width in boxes]
    assert len(spans) == heatmap.STEPS
    assert all(end > start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] - spans[0][0] == heatmap.STEPS * heatmap.STEP_WIDTH
