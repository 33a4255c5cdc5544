"""`python -m benchmarks.probe recipes/agnews.toml`: the frozen baseline on the examples that the recipe's seeds draw.

A logistic regression, its C by cross-validation on the support, on mean-pooled embeddings of length 1 of the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import deltaprompt as dp
from deltaprompt.cli.data import Deal, rows
from deltaprompt.cli.recipe import build, read_toml
from deltaprompt.study.probe import embedded, regression


def main() -> None:
    """Prints the accuracy of every seed, their mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    recipe = build(read_toml(parser.parse_args().recipe))
    if recipe.data.train is None or recipe.data.test is None:
        parser.error("the recipe names no training or no test file")
    train, test = (rows(source, recipe.data, ("text",), "train") for source in (recipe.data.train, recipe.data.test))
    backbone = dp.load(recipe.backbone.name, kind="encoder")
    tested, gold = embedded(backbone, test, recipe.task.max_length), [e.label for e in test]
    each = []
    for seed in recipe.seeds:
        support = list(Deal(recipe, train, None)(seed)[0])
        states = embedded(backbone, support, recipe.task.max_length)
        each.append(float(regression(states, [e.label for e in support]).score(tested, gold)))
    print(
        json.dumps(
            {"mean": statistics.fmean(each), "std": statistics.stdev(each) if len(each) > 1 else 0.0, "each": each}
        )
    )


if __name__ == "__main__":
    main()
