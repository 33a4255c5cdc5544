"""Training: one loop on accelerate, with early stopping, resumption after a kill, and several seeds."""

from deltaprompt.trainer.loop import fit
from deltaprompt.trainer.progress import Progress, RichProgress, Silent
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.seeds import SeedsResult, fit_seeds
from deltaprompt.trainer.training import Training

__all__ = ["Progress", "RichProgress", "Run", "SeedsResult", "Silent", "Training", "fit", "fit_seeds"]
