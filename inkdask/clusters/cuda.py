"""One worker process for each GPU of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from inkdask.clusters.local import own_client, own_options
from inkdask.errors import InkdaskError

if TYPE_CHECKING:
    from distributed import Client

THREADS = 8  # per worker: one waits for the GPU, the others read and decode ahead


@contextmanager
def cuda(devices: str | None, max_workers: int | None) -> Iterator[Client]:
    """Start a worker for each GPU that ``devices`` names, as CUDA counts them; None for each GPU.

    There is no RMM pool, because CUDA graphs (``COMPILE_MODE=reduce-overhead``) need torch's own
    allocator, and CuPy uses only a few megabytes beside it.
    """
    try:
        from dask_cuda import LocalCUDACluster
        from dask_cuda.utils import get_n_gpus
    except ImportError as error:
        raise InkdaskError(
            f"--cluster cuda needs dask-cuda: pip install 'inkdask[cuda]' ({error})."
        ) from error

    if devices is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with ExitStack() as stack:
        options = stack.enter_context(own_options())
        try:
            gpus = len(devices.split(",")) if devices else get_n_gpus()
            cluster = LocalCUDACluster(
                CUDA_VISIBLE_DEVICES=devices,
                n_workers=min(max_workers or gpus, gpus),
                threads_per_worker=THREADS,
                **options,
            )
        except Exception as error:  # NVML raises many kinds
            reason = str(error).splitlines()[0].rstrip(".")
            raise InkdaskError(f"--cluster cuda finds no GPU that it can use: {reason}.") from error
        stack.enter_context(cluster)
        yield stack.enter_context(own_client(cluster))
