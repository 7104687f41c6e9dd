"""The experiment E7: :mod:`benchmarks.papers.e7_run` runs it, :mod:`benchmarks.papers.e7_report` reports it."""

from benchmarks.papers.e7_report import plot, report
from benchmarks.papers.e7_run import NAME, TITLE, add_arguments, run

__all__ = ["NAME", "TITLE", "add_arguments", "plot", "report", "run"]
