"""Studies: methods × shots × seeds × data sets on one machine, one table, and what is behind each of its numbers."""

from deltaprompt.study.bootstrap import Difference
from deltaprompt.study.called import Called
from deltaprompt.study.cells import Cell
from deltaprompt.study.comparison import Comparison, Figure, Total
from deltaprompt.study.data import DataSet
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.study.plot import plot
from deltaprompt.study.probe import Probe
from deltaprompt.study.running import compare
from deltaprompt.study.tables import as_json, csv_of, markdown
from deltaprompt.study.trained import Trained

__all__ = [
    "Called",
    "Cell",
    "Comparison",
    "DataSet",
    "Difference",
    "Entry",
    "Figure",
    "Method",
    "Outcome",
    "Probe",
    "Total",
    "Trained",
    "as_json",
    "compare",
    "csv_of",
    "markdown",
    "plot",
]
