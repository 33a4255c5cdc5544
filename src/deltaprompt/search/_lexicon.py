"""The words that prompts are drawn from, by part of speech: common English ones, chosen without looking at any task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LEXICON: Final[Mapping[str, tuple[str, ...]]] = {
    part: tuple(words.split())
    for part, words in {
        "noun": """
            answer area article author book business case category chapter city class comment company country course
            day decision detail effect email evening event example experience fact family feeling field film friend
            game government group half head headline history home hour house idea information issue item job kind
            language law letter life line list market matter meaning message minute moment money month morning name
            nature news note number office opinion order page paper part party people person piece place point policy
            power price problem product program question reason report response result review room school section
            sense sentence service side sign sort source statement story student subject summary system team term text
            theme thing thought time title tone topic type value view voice way week word work world writer year
        """,
        "verb": """
            added answered asked became began believed brought called came changed checked claimed continued decided
            described discussed ended explained felt found gave got heard helped kept knew learned left liked looked
            made meant mentioned moved needed offered played read received remained said saw seemed sent showed
            sounded spoke started stated stayed talked thought told took turned used wanted was watched went won wrote
        """,
        "preposition": """
            about above across after against along among around as at before behind below beside between beyond by
            for from in inside into like near of off on over past since through to toward under until upon with within
            without
        """,
        "adjective": """
            able bad basic best better big black bright central certain clear close cold common complete current dark
            deep different difficult easy entire final fine first foreign free full general good great hard high human
            important interesting large last late likely little local long main major modern national natural new next
            old only open other personal political poor popular possible private public quick ready real recent right
            serious short similar simple single small social special strange strong sure top total true usual various
            whole wide wrong young
        """,
        "adverb": """
            actually again almost already always away clearly completely even ever exactly finally fully here however
            indeed instead just later maybe mostly much never nearly now often once only perhaps probably quickly quite
            rather really simply so sometimes soon still suddenly then there together too truly usually very well
        """,
        "pronoun": "all everything he I it nobody nothing she something that they this we what you",
    }.items()
}

FOLLOWING: Final = (  # the answer comes last, as a left-to-right model needs it
    "{text} <preposition> <noun> {mask}.",
    "{text} <noun> <verb> {mask}.",
    "{text} <adjective> <noun>: {mask}.",
    "{text} <verb> <preposition> {mask}.",
    "{text} <pronoun> <verb> <adverb> {mask}.",
    "{text} <preposition> <adjective> <noun> {mask}.",
    "{text} <noun>: {mask}.",
)
LEADING: Final = (  # the answer comes first
    "{mask} <noun>: {text}",
    "<adjective> {mask} <noun>: {text}",
    "<noun> <preposition> {mask}: {text}",
    "<pronoun> <verb> {mask}: {text}",
)
