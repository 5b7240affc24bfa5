"""Device, precision and cores of this process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from itertools import product
from operator import attrgetter

import torch
from dask.system import CPU_COUNT

from inkdask.errors import InkdaskError
from inkdask.failures import dask_worker
from inkdask.specs import Network

log = logging.getLogger("inkdask")


def device_for(network: Network) -> torch.device:
    """Return the device of a network: the first GPU of this process, or the CPU.

    A callable runs where its parameters are, and on the CPU without parameters. An `InkdaskError`
    says why a torch for CUDA cannot use a GPU that is there.
    """
    if network.function is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1", "NoDevFiles"):
            _check_idle_gpu()
        return torch.device("cpu")
    parameters = getattr(network.function, "parameters", lambda: iter(()))()
    return next((p.device for p in parameters), torch.device("cpu"))


@cache  # one warning is enough
def _check_idle_gpu() -> None:
    """Raise an `InkdaskError`, or warn, where the machine has a GPU that torch does not use."""
    try:
        import pynvml

        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        driver = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no driver, or no GPU
        return
    if torch.version.cuda is None:
        log.warning("The CPU runs and the %s does not: this torch is built without CUDA.", name)
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise InkdaskError(
            f"This torch, built for CUDA {torch.version.cuda}, cannot use the {name} with driver "
            f"{driver}: {str(error).partition('. ')[0]}; install a newer driver, or torch for CUDA "
            "12 with inkdask[cuda12], or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU."
        ) from None


def precision_for(network: Network, device: torch.device) -> str:
    """Return the arithmetic of a network: ``float32``, ``bfloat16`` or ``int8``.

    Empty for a callable, which has its own.
    """
    if network.function is not None:
        return ""
    if network.precision == "auto":
        return str(native_dtype(device)).removeprefix("torch.")
    if network.precision == "bfloat16":
        _check_bfloat16(device)
    if network.precision == "int8":
        _check_int8(device)
        if has_amx():
            log.warning(
                "Precision int8 is slower than bfloat16 on this CPU, which has AMX: "
                "%s runs in bfloat16.",
                network.model.key,
            )
            return "bfloat16"
    return network.precision


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, and float32 elsewhere.

    Emulated, bfloat16 is several times slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = has_amx() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def has_int8(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for int8 (VNNI); other CPUs emulate it."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


def has_packed_bfloat16(device: torch.device) -> bool:
    """Whether linear layers in bfloat16 can run packed: not in every build of torch."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.ops.mkldnn._is_mkldnn_acl_supported()  # ARM's kernels fuse no activation
    )


def _check_bfloat16(device: torch.device) -> None:
    """Raise an `InkdaskError` where a GPU would only emulate bfloat16."""
    if device.type == "cuda" and native_dtype(device) is not torch.bfloat16:
        raise InkdaskError(
            f"Precision bfloat16 needs a GPU of compute capability 8.0 or newer, and "
            f"{torch.cuda.get_device_name(device)} is older; precision auto takes what it has."
        )


def _check_int8(device: torch.device) -> None:
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
    """Whether an error says that a device lacks memory.

    Torch's allocator raises a type of its own. Other libraries allocate memory, too, and their
    errors differ in their words only.
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
    """Return the number of cores for a forward pass; call it in the thread of a task.

    Dask starts worker processes with ``OMP_NUM_THREADS=1``, because tasks run side by side. But
    one thread runs all forward passes of a worker, so that thread may use all cores of the worker.
    """
    if worker := dask_worker():
        state = worker.state
        return int(state.total_resources.get("cores", state.nthreads))
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(named) if named.isdigit() and int(named) else CPU_COUNT


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Let a GPU compute float32 products in TF32, and try which convolutions are fastest.

    Compile and run a network within blocks of this kind, because torch compiles anew where the
    precision differs. See `full_float32` about threads.
    """
    with _float32(fast=True) if device.type == "cuda" else nullcontext():
        yield


def full_float32() -> AbstractContextManager[None]:
    """Compute float32 without TF32, for comparison.

    Torch's flags are of the whole process. So a second thread waits for the end of the first one's
    block, fast or full. Other code, such as cells of a notebook, sees a block's flags while the
    block runs. The end of a block restores what was set before.
    """
    return _float32(fast=False)


@contextmanager
def _float32(fast: bool) -> Iterator[None]:
    with _flags, ExitStack() as restored:
        for owner, flag in _FLAGS:
            # Torch 2.8 lacks some, and newer ones raise where their two ways to say it disagree.
            with suppress(AttributeError, RuntimeError):
                at = attrgetter(owner)(torch.backends)
                restored.callback(setattr, at, flag, getattr(at, flag))
        with suppress(RuntimeError):
            precision = torch.get_float32_matmul_precision()
            restored.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        torch.backends.cudnn.benchmark |= fast
        yield


_flags = threading.RLock()  # held in a block
_NEWER = product(("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn"), ["fp32_precision"])
_FLAGS = (*_NEWER, ("cudnn", "allow_tf32"), ("cudnn", "benchmark"))
