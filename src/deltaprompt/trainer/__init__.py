"""Training: one loop on accelerate, with early stopping, resumption after a kill, and several seeds."""

from deltaprompt.trainer.fitting import fit
from deltaprompt.trainer.many import fit_many
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress, RichProgress, Silent
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.seeds import SeedsResult, fit_seeds
from deltaprompt.trainer.training import Training

__all__ = [
    "Plan",
    "Progress",
    "RichProgress",
    "Run",
    "SeedsResult",
    "Silent",
    "Training",
    "fit",
    "fit_many",
    "fit_seeds",
]
