"""A small Kubernetes for tests: an API server whose pods are processes with networks of their own.

What runs against it is real: the Dask operator, kubectl, the client. It is started in a network of
its own by `tests.kubernetes.world`.
"""
