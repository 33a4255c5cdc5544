"""PLET's templates for entity rows: x in its window with the mention e kept, then a prompt (Ding et al. 2022, 3.1).

What is too long loses the words that are farthest from the mention.
"""

from __future__ import annotations

from typing import Final

from deltaprompt.errors import TemplateError

SENTENCE: Final = "{left|truncate:head}{mention|keep}{right}"
HARD1: Final = f"{SENTENCE} {{mention|keep}} is {{mask}}"  # x e is [MASK]
HARD2: Final = f"{SENTENCE} {{mention|keep}} is a {{mask}}"  # x e is a [MASK]
HARD3: Final = f"{SENTENCE} In this sentence, {{mention|keep}} is a {{mask}}"  # the paper's main one


def soft(length: int = 2) -> str:
    """`x [P] e [P1] … [Pl] [MASK]` with l = `length` trained tokens behind the mention and one before it."""
    if length < 1:
        raise TemplateError(f"got length {length}; 1 or more trained tokens stand behind the mention")
    return f"{SENTENCE} {{soft:1}} {{mention|keep}} {{soft:{length}}} {{mask}}"
