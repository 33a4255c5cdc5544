"""Template × tokenizer -> `Batch`: whole lists of examples at once, with the positions where the answer is read."""

from deltaprompt.features.batching import bucketed
from deltaprompt.features.features import Features
from deltaprompt.features.layout import Kind
from deltaprompt.features.rows import Encoded, Row
from deltaprompt.features.soft import SoftBlock

__all__ = ["Encoded", "Features", "Kind", "Row", "SoftBlock", "bucketed"]
