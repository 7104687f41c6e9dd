"""The experiment llm: :mod:`benchmarks.papers.llm_run` runs it, :mod:`benchmarks.papers.llm_report` reports it."""

from benchmarks.papers.llm_report import plot, report
from benchmarks.papers.llm_run import NAME, TITLE, add_arguments, run

__all__ = ["NAME", "TITLE", "add_arguments", "plot", "report", "run"]
