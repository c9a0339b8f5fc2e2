"""Milestones, checks and guidance: pure functions on the typed table of per-layer rows.

`table` holds the rows, `published` reads the earlier system's, `summary.summarise` measures them,
and `compat` shows the result under published names. Nothing here knows torch or a model.
"""
