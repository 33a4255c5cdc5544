"""A task, and the model that a backbone adapted to it is."""

from deltaprompt.model.model import Model, adapt
from deltaprompt.model.task import Task

__all__ = ["Model", "Task", "adapt"]
