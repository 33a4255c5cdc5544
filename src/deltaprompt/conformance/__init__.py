"""Proof over every text architecture of the installed transformers: tiny models, and checks of each delta on each."""
