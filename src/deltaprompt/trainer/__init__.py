"""Training: one loop on accelerate, with early stopping, resumption after a kill, several seeds, and grids."""

from deltaprompt.trainer.fitting import fit
from deltaprompt.trainer.grid import Cell, CellResult, GridResult, fit_grid
from deltaprompt.trainer.many import fit_many
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress, RichProgress, Silent
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.seeds import SeedsResult, fit_seeds
from deltaprompt.trainer.self_supervised import fit_typing
from deltaprompt.trainer.training import Training

__all__ = [
    "Cell",
    "CellResult",
    "GridResult",
    "Plan",
    "Progress",
    "RichProgress",
    "Run",
    "SeedsResult",
    "Silent",
    "Training",
    "fit",
    "fit_grid",
    "fit_many",
    "fit_seeds",
    "fit_typing",
]
