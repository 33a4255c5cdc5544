"""`python -m benchmarks.probe recipes/agnews.toml`: the frozen baseline on the examples that the recipe's seeds draw.

A logistic regression, its C by cross-validation on the support, on mean-pooled embeddings of length 1 of the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

import deltaprompt as dp
from deltaprompt.cli.data import Deal, rows
from deltaprompt.cli.recipe import build, read_toml

INVERSE_STRENGTHS = [10.0**power for power in range(-2, 5)]


def embedded(backbone: dp.Backbone, examples: list[dp.Example], max_length: int | None) -> torch.Tensor:
    """Frozen embeddings [n, d]."""
    model = dp.adapt(backbone, dp.Task("{text}", ("a", "b"), dp.Prototypes(), max_length=max_length))
    states = model.embed(model.features, examples)
    return torch.nn.functional.normalize(states, dim=-1)


def main() -> None:
    """Prints the accuracy of every seed, their mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    recipe = build(read_toml(parser.parse_args().recipe))
    if recipe.data.train is None or recipe.data.test is None:
        parser.error("the recipe names no training or no test file")
    train, test = (rows(source, recipe.data, ("text",), "train") for source in (recipe.data.train, recipe.data.test))
    backbone = dp.load(recipe.backbone.name)
    tested, gold = embedded(backbone, test, recipe.task.max_length), [e.label for e in test]
    each = []
    for seed in recipe.seeds:
        support = list(Deal(recipe, train, None)(seed)[0])
        folds = StratifiedKFold(4, shuffle=True, random_state=0)
        search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": INVERSE_STRENGTHS}, cv=folds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            search.fit(embedded(backbone, support, recipe.task.max_length), [e.label for e in support])
        each.append(float(search.score(tested, gold)))
    print(json.dumps({"mean": statistics.fmean(each), "std": statistics.stdev(each), "each": each}))


if __name__ == "__main__":
    main()
