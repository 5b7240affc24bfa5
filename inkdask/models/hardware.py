"""What this process may compute with: device, precision, cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from dask.system import CPU_COUNT

from inkdask.errors import InkdaskError
from inkdask.specs import Network


def device_for(network: Network) -> torch.device:
    """Return the first GPU this process sees, or the CPU.

    A callable gets its tiles where its parameters are, if it has any, and on the CPU otherwise.
    """
    if network.function is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = getattr(network.function, "parameters", lambda: iter(()))()
    return next((p.device for p in parameters), torch.device("cpu"))


def precision_for(network: Network, device: torch.device) -> torch.dtype:
    """Return the dtype that a network reads; in int8, where layers quantise, it is float32."""
    if network.function is not None or network.precision in ("float32", "int8"):
        return torch.float32
    return torch.bfloat16 if network.precision == "bfloat16" else native_dtype(device)


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, and float32 elsewhere.

    Emulated, bfloat16 is several times slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def has_int8(device: torch.device) -> bool:
    """Whether TimeSformer can run in int8: only where the hardware does, others emulate it."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


def has_packed_bfloat16(device: torch.device) -> bool:
    """Whether linear layers in bfloat16 can run packed: not in every build of torch."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.ops.mkldnn._is_mkldnn_acl_supported()  # ARM's have no activation in them
    )


def check_bfloat16(device: torch.device) -> None:
    """Raise an `InkdaskError` where a GPU would only emulate bfloat16, slowly or not at all."""
    if device.type == "cuda" and native_dtype(device) is not torch.bfloat16:
        raise InkdaskError(
            f"Precision bfloat16 needs a GPU of compute capability 8.0 or newer, and "
            f"{torch.cuda.get_device_name(device)} is older; precision auto takes what it has."
        )


def check_int8(device: torch.device) -> None:
    """Raise an `InkdaskError` where a network cannot run in int8."""
    if device.type != "cpu":
        raise InkdaskError(
            "Precision int8 is for CPUs, and this process has a GPU; precision auto suits it."
        )
    if not has_int8(device):
        raise InkdaskError(
            "Precision int8 needs a CPU with VNNI instructions, which this one lacks; precision "
            "auto takes what it has."
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is one of the many in which a device says that it lacks memory.

    Torch's allocator has a type for it; the libraries that take their own have words.
    """
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(word in said for word in _NO_MEMORY)


_NO_MEMORY = (
    "out of memory",
    "allocate memory",  # of a CPU
    "not enough memory",
    "alloc_failed",  # cuBLAS and cuDNN
    "unable to find an engine",  # cuDNN, when no workspace of any algorithm fits
)


def cores() -> int:
    """Return how many cores a forward pass may use; to be asked in a task's own thread.

    Dask starts worker processes with ``OMP_NUM_THREADS=1``, which is meant for tasks that run side
    by side. All forward passes of a worker go through one thread, so that thread may have every
    core the worker counts as its own.
    """
    if distributed := sys.modules.get("distributed"):
        try:
            worker = distributed.get_worker().state
            return int(worker.total_resources.get("cores", worker.nthreads))
        except ValueError:
            pass  # not in a task of a worker
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(named) if named.isdigit() and int(named) else CPU_COUNT


def fast_float32(device: torch.device) -> None:
    """Let a GPU compute float32 products in TF32, and choose its convolutions by trying them."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32, for comparison."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
