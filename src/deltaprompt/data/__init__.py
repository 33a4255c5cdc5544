"""Rows from files and the Hub become `Example`s; few-shot samples and dev splits are dealt from them, by seed."""

from __future__ import annotations

from deltaprompt.data import shipped
from deltaprompt.data.chats import read_chats
from deltaprompt.data.entities import read_entities
from deltaprompt.data.episodes import (
    Episode,
    class_episodes,
    limited_to,
    read_episodes,
    sentence_episodes,
    split_by_label,
)
from deltaprompt.data.label_words import read_label_words
from deltaprompt.data.linked import Linked, find_mentions
from deltaprompt.data.pairs import grouped, hold_out, read_pairs, told_apart
from deltaprompt.data.readers import labels_of, read, read_texts
from deltaprompt.data.relations import read_relations
from deltaprompt.data.samplers import few_sentences, few_shot, split
from deltaprompt.data.tagged import in_words, read_tagged, span_labels, word_tags

__all__ = [
    "Episode",
    "Linked",
    "class_episodes",
    "few_sentences",
    "few_shot",
    "find_mentions",
    "grouped",
    "hold_out",
    "in_words",
    "labels_of",
    "limited_to",
    "read",
    "read_chats",
    "read_entities",
    "read_episodes",
    "read_label_words",
    "read_pairs",
    "read_relations",
    "read_tagged",
    "read_texts",
    "sentence_episodes",
    "shipped",
    "span_labels",
    "split",
    "split_by_label",
    "told_apart",
    "word_tags",
]
