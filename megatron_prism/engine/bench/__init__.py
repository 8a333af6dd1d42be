"""Measuring what a training step costs: the cases of a benchmark, the sides that are compared, clocks, profiles, figures."""
