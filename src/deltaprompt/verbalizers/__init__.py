"""Verbalizers, one a file: from the states where the answer is read to class scores. `_base` says what one is."""
