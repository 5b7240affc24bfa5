"""A small Kubernetes for tests: an API server whose pods are processes with networks of their own.

The Dask operator, kubectl and the client are the real ones. `tests.kubernetes.world` starts it in a
network of its own.
"""
