"""What the model is asked: a template string, parsed once to an immutable tree, printed back to the same string."""

from deltaprompt.templates.filters import FILTERS, apply_filters
from deltaprompt.templates.language import parse
from deltaprompt.templates.pieces import (
    ENCODERS,
    SPECIALS,
    Cut,
    Demos,
    Encoder,
    Field,
    Literal,
    Mask,
    Piece,
    Prefix,
    Role,
    RoleName,
    Soft,
    Special,
)
from deltaprompt.templates.tree import Template, Turn

__all__ = [
    "ENCODERS",
    "FILTERS",
    "SPECIALS",
    "Cut",
    "Demos",
    "Encoder",
    "Field",
    "Literal",
    "Mask",
    "Piece",
    "Prefix",
    "Role",
    "RoleName",
    "Soft",
    "Special",
    "Template",
    "Turn",
    "apply_filters",
    "parse",
]
