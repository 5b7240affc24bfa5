"""Where a job runs: threads, processes, GPUs, Kubernetes, or a scheduler that is there already."""

from inkdask.clusters.connection import connect
from inkdask.clusters.cuda import cuda
from inkdask.clusters.kubernetes import kubernetes
from inkdask.clusters.local import local
from inkdask.clusters.report import report

__all__ = ["connect", "cuda", "kubernetes", "local", "report"]
