"""What every fitting command does with a recipe: which deltas are trained, what is said of them, and every seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.recipe import Recipe
    from deltaprompt.deltas._base import Delta
    from deltaprompt.model.trainable import Trainable
    from deltaprompt.trainer import SeedsResult
    from deltaprompt.types import Example


def deltas_of(recipe: Recipe, backbone: Backbone) -> Sequence[Delta]:
    """Those asked for, or the default."""
    from deltaprompt.defaults import deltas_for

    return deltas_for(backbone) if recipe.deltas is None else recipe.deltas


def called(recipe: Recipe, deltas: Sequence[Delta]) -> str:
    """The deltas by name, and whether they were not asked for but chosen."""
    names = " + ".join(type(delta).__name__ for delta in deltas)
    return names + (" on every linear map (the default)" if recipe.deltas is None else "") if names else "no delta"


def fit_recipe(
    recipe: Recipe,
    make_model: Callable[[Sequence[int]], Trainable],
    train_of: Callable[[int], tuple[Sequence[Any], Sequence[Any] | None]],
    test: Sequence[Any] | None,
    resume: bool,
    unlabelled: Sequence[Example] = (),
) -> SeedsResult:
    """Trains a recipe's seeds as it says."""
    from deltaprompt.trainer import fit_seeds

    return fit_seeds(
        make_model,
        train_of,
        test,
        seeds=recipe.seeds,
        training=recipe.training,
        together=recipe.together,
        out=recipe.out,
        resume=resume,
        unlabelled=unlabelled,
    )
