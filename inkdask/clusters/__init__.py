"""Clusters to run a job on: processes, GPUs, Kubernetes, or a running scheduler."""

from inkdask.clusters.connection import connect
from inkdask.clusters.cuda import cuda
from inkdask.clusters.kubernetes import kubernetes
from inkdask.clusters.local import local
from inkdask.clusters.report import report

__all__ = ["connect", "cuda", "kubernetes", "local", "report"]
