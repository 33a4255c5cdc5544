"""How good texts are: BLEU and chrF by sacrebleu, ROUGE by rouge-score, each against all right texts of an example."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from deltaprompt.data.formats import optional
from deltaprompt.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")


def scores(texts: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`{"bleu", "chrf", "rouge1", "rouge2", "rougeL"}`, each of 0 to 100.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) are of all texts together, ROUGE (Lin 2004) the mean of each
    text's F measure against the best of its right texts.

    Args:
        texts: what was written.
        right: of each text all that it might have been, one or more.

    Raises:
        ConfigError: sacrebleu or rouge-score is not there.
    """
    if len(texts) != len(right) or not texts or not all(right):
        raise ConfigError(f"{len(texts)} texts and {len(right)} lists of right ones; give each text one or more")
    bleu, chrf = _sacrebleu()
    columns = _columns(right)
    rouge = optional("rouge_score.rouge_scorer", "generation").RougeScorer(list(ROUGE), use_stemmer=False)
    each = [rouge.score_multi(list(own), text) for text, own in zip(texts, right, strict=True)]
    return {
        "bleu": float(bleu.corpus_score(list(texts), columns).score),
        "chrf": float(chrf.corpus_score(list(texts), columns).score),
        **{name: 100 * fmean(float(found[name].fmeasure) for found in each) for name in ROUGE},
    }


def by_label(texts: Sequence[str], right: Sequence[Sequence[str]], labels: Sequence[str | None]) -> dict[str, float]:
    """The scores of all, and those of each label, `bleu_<label>`."""
    found = scores(texts, right)
    for label in dict.fromkeys(label for label in labels if label is not None):
        rows = [i for i, own in enumerate(labels) if own == label]
        own = scores([texts[i] for i in rows], [right[i] for i in rows])
        found |= {f"{name}_{label}": value for name, value in own.items()}
    return found


def signatures(right: Sequence[Sequence[str]]) -> dict[str, str]:
    """What sacrebleu tells of how it measures against these right texts."""
    bleu, chrf = _sacrebleu()
    for metric in (bleu, chrf):
        metric.corpus_score([own[0] for own in right], _columns(right))
    return {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}


def _sacrebleu() -> tuple[Any, Any]:
    metrics = optional("sacrebleu.metrics", "generation")
    return metrics.BLEU(force=True), metrics.CHRF()  # texts that are in tokens already are taken as they are


def _columns(right: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first right text of each, then the second of each that has one, …: as sacrebleu wants them."""
    most = max(map(len, right))
    return [[own[n] if n < len(own) else None for own in right] for n in range(most)]
