"""The experiment E6: :mod:`benchmarks.papers.e6_run` runs it, :mod:`benchmarks.papers.e6_report` reports it."""

from benchmarks.papers.e6_report import plot, report
from benchmarks.papers.e6_run import NAME, TITLE, add_arguments, run

__all__ = ["NAME", "TITLE", "add_arguments", "plot", "report", "run"]
