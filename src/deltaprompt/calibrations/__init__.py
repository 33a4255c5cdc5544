"""Calibrations, one a file: what a model would say anyway is taken away from what it says of a text."""
