"""What writing systems make of letters: the marks that belong to the letter before them.

Python's `re` has no class of marks, and its word characters leave them out: words of Hindi, and words whose accents
are characters of their own, would fall apart.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from unicodedata import category

JOINERS = "\u200c\u200d"  # which join letters or keep them apart within a word (Unicode Annex 29, rule WB4)


@cache
def marks() -> str:
    """A class of `re` for what belongs to the character before it: all marks of Unicode (M), and the joiners."""
    planes = chain(range(0x300, 0x20000), range(0xE0100, 0xE01F0))  # letters' own, and selectors of their variants
    return f"[{JOINERS}{''.join(sign for sign in map(chr, planes) if category(sign).startswith('M'))}]"
