"""What the model is asked: a template string, parsed once to an immutable tree, printed back to the same string."""

from deltaprompt.templates.filters import FILTERS, apply_filters
from deltaprompt.templates.language import Cut, Field, Literal, Mask, Piece, Role, RoleName, Soft, Template, Turn, parse

__all__ = [
    "FILTERS",
    "Cut",
    "Field",
    "Literal",
    "Mask",
    "Piece",
    "Role",
    "RoleName",
    "Soft",
    "Template",
    "Turn",
    "apply_filters",
    "parse",
]
