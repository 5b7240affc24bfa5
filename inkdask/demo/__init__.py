"""Demo: a segment whose letters only depth shows, and the real job on it."""

from inkdask.demo.job import DemoResult, auc, run

__all__ = ["DemoResult", "auc", "run"]
