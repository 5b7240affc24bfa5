"""Clusters to run a job on: processes, GPUs, Kubernetes, or a running scheduler."""

from inkdask.clusters.connection import connect
from inkdask.clusters.report import report

__all__ = ["connect", "report"]
