"""Cleaning as part of `prism prep`: filters, decontamination, exact and near duplicates (docs/cleaning.md)."""
