"""Upkeep of a store: `qrpo ls`, `verify`, `gc` and `compact`, and which recipes an experiment uses."""
