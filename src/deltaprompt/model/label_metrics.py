"""How well labels are found: accuracy and macro F1; of type paths and of several labels the loose scores of typing.

And how well texts that belong to no label are told from those that do: AUROC.

Sets are compared with the ancestors of their labels in them (Ling & Weld 2012, section 4.1): strict accuracy is the
share of examples whose sets are equal, loose macro scores are means over examples, loose micro ones are of all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.hierarchy import Way, ancestors, are_paths
from deltaprompt.model.several import chosen, right
from deltaprompt.model.several import loss as several_loss
from deltaprompt.model.task import Task
from deltaprompt.model.trainable import check_known, evaluating

Classes = Sequence[Sequence[int]]  # of each example


@torch.inference_mode()
def measured(
    module: nn.Module, features: Features, task: Task, rows: Sequence[Encoded], batch_size: int, slot: int
) -> dict[str, float]:
    """`{"accuracy", "macro_f1", …, "loss"}` of labelled rows, by one slot of the model that a module is.

    The loss is the cross-entropy of the scores, also where a verbalizer trains by another one, of whole batches.
    """
    check_known([row.label is not None or bool(row.labels) for row in rows])
    loss, device = 0.0, next(module.parameters()).device
    gold, found = list[list[int]](), list[list[int]]()
    with evaluating(module):
        for batch in features.batches(rows, batch_size):
            out = module(batch.to(device), slot)
            assert batch.labels is not None
            logits, classes = out["logits"].float().cpu(), batch.labels.cpu()
            each = several_loss(logits, classes) if task.several else cross_entropy(logits, classes)
            loss += float(each) * len(classes)  # of a verbalizer whose own is of a whole batch too
            gold += right(batch.labels)
            found += chosen(out["logits"], task.several)
    return {**measures(task.names, gold, found, task.several), "loss": loss / len(gold)}


def measures(names: Sequence[str], gold: Classes, found: Classes, several: bool) -> dict[str, float]:
    """`accuracy`, `macro_f1`, and of labels that are paths or several `typing`'s.

    Args:
        names: of the classes.
        gold: the right classes of each example, one or more.
        found: the classes that a model chose, one or more.
        several: whether an example may have several.
    """
    if several:
        told = {"accuracy": 0.0, "macro_f1": macro_f1(len(names), gold, found)}
    else:
        told = _alone([own[0] for own in gold], [own[0] for own in found], len(names))
    if not several and not are_paths(names):
        return told
    says = ancestors(names)
    sets = [[frozenset[Way]().union(*(says[names[i]] for i in own)) for own in each] for each in (gold, found)]
    return told | typing(*sets)


def typing(gold: Sequence[Set[Way]], found: Sequence[Set[Way]]) -> dict[str, float]:
    """Strict `accuracy`, loose macro and micro precision, recall and F1 of sets, none of which is empty."""
    pairs = list(zip(gold, found, strict=True))
    n = len(pairs)
    both = [len(right & said) for right, said in pairs]
    macro_p = math.fsum(b / len(said) for b, (_, said) in zip(both, pairs, strict=True)) / n
    macro_r = math.fsum(b / len(right) for b, (right, _) in zip(both, pairs, strict=True)) / n
    micro_p, micro_r = sum(both) / sum(map(len, found)), sum(both) / sum(map(len, gold))
    return {
        "accuracy": sum(right == said for right, said in pairs) / n,
        **_three("loose_macro", macro_p, macro_r),
        **_three("loose_micro", micro_p, micro_r),
    }


def macro_f1(classes: int, gold: Classes, found: Classes) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); 0 for a class that is neither right nor found anywhere."""
    count = [np.bincount([i for own in each for i in own], minlength=classes) for each in (gold, found)]
    hits = [i for right, said in zip(gold, found, strict=True) for i in {*right} & {*said}]
    both = np.bincount(np.array(hits, dtype=np.int64), minlength=classes)
    return float(np.mean(2 * both / np.maximum(count[0] + count[1], 1)))


def auroc(inside: npt.ArrayLike, outside: npt.ArrayLike) -> float:
    """P(score inside > score outside) + P(they are equal) / 2, over all pairs: the area under the ROC curve.

    Args:
        inside: scores of texts that belong to a label.
        outside: of texts that belong to none; 1/2 is what chance comes to.
    """
    from sklearn.metrics import roc_auc_score

    each = [np.asarray(scores, dtype=np.float64).ravel() for scores in (inside, outside)]
    scores = np.concatenate(each)
    if not all(map(len, each)) or np.isnan(scores).any():
        got = " and ".join(f"{len(own)} ({int(np.isnan(own).sum())} of them NaN)" for own in each)
        raise ConfigError(
            "AUROC compares scores of texts that belong to a label with scores of texts that belong to none: one or "
            f"more of each, all of them numbers; got {got}"
        )
    order = np.unique(scores, return_inverse=True)[1]  # all that counts; scores may be infinite
    return float(roc_auc_score(np.repeat([1, 0], [len(own) for own in each]), order))


def _alone(gold: Sequence[int], found: Sequence[int], classes: int) -> dict[str, float]:
    """Of one label an example."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(gold, found, average="macro", labels=range(classes), zero_division=0.0)
    return {"accuracy": float(accuracy_score(gold, found)), "macro_f1": float(macro)}


def _three(name: str, precision: float, recall: float) -> dict[str, float]:
    """Precision, recall and their harmonic mean."""
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {f"{name}_precision": precision, f"{name}_recall": recall, f"{name}_f1": f1}
