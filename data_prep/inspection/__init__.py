"""Seeing what is in prepared data: figures of a blend, a few documents with their tokens, one page that holds both."""
