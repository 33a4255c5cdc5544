"""Searches for prompts, one a file: lottery prompts, label words and templates (LM-BFF), next to what chance finds.

Training rows rank, other rows choose, test rows are looked at once, at the end.
"""

from deltaprompt.search._draws import Draws
from deltaprompt.search._result import Answer, Candidate, SearchResult, Table
from deltaprompt.search._session import Score, Tuning
from deltaprompt.search.label_words import WordSearch, label_words
from deltaprompt.search.lottery import Lottery, lottery
from deltaprompt.search.templates import TemplateSearch, templates

__all__ = [
    "Answer",
    "Candidate",
    "Draws",
    "Lottery",
    "Score",
    "SearchResult",
    "Table",
    "TemplateSearch",
    "Tuning",
    "WordSearch",
    "label_words",
    "lottery",
    "templates",
]
