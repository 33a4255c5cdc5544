"""Deltas, one method a file; the file's name is the delta's name. `_base` says what a delta is."""
