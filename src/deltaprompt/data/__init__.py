"""Rows from files and the Hub become `Example`s; few-shot samples and dev splits are dealt from them, by seed."""

from __future__ import annotations

from deltaprompt.data import shipped
from deltaprompt.data.chats import read_chats
from deltaprompt.data.entities import read_entities
from deltaprompt.data.label_words import read_label_words
from deltaprompt.data.linked import Linked, find_mentions
from deltaprompt.data.pairs import grouped, hold_out, read_pairs, told_apart
from deltaprompt.data.readers import labels_of, read, read_texts
from deltaprompt.data.samplers import few_shot, split

__all__ = [
    "Linked",
    "few_shot",
    "find_mentions",
    "grouped",
    "hold_out",
    "labels_of",
    "read",
    "read_chats",
    "read_entities",
    "read_label_words",
    "read_pairs",
    "read_texts",
    "shipped",
    "split",
    "told_apart",
]
