"""Test the device, and the precision of float32 on a GPU; torch keeps its flags without one."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
import torch

from inkdask.models.hardware import fast_float32, full_float32
from tests.nvml import build_nvml

GPU = torch.device("cuda")


def or_fault(read):
    try:
        return read()
    except RuntimeError:
        return "contradiction"


def flags():
    """Precisions of products, and whether convolutions are tried, by all ways to read them."""
    found = {
        "matmul": or_fault(torch.get_float32_matmul_precision),
        "convolution": or_fault(lambda: torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
    }
    new = {
        "cuda": torch.backends.cuda.matmul,
        "mkldnn": torch.backends.mkldnn.matmul,
        "conv": getattr(torch.backends.cudnn, "conv", None),
        "rnn": getattr(torch.backends.cudnn, "rnn", None),
    }
    return found | {name: getattr(of, "fp32_precision", None) for name, of in new.items()}


FAST = {"matmul": "high", "convolution": True, "benchmark": True}
FULL = {"matmul": "highest", "convolution": False, "benchmark": False}


@contextmanager
def as_before():
    """Restore what a test sets as a user; the default cannot be read where a test sets it."""
    before = flags()
    yield
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.allow_tf32 = before["convolution"]
    torch.backends.cudnn.benchmark = before["benchmark"]
    if before["cuda"]:
        torch.backends.cuda.matmul.fp32_precision = before["cuda"]
        torch.backends.mkldnn.matmul.fp32_precision = before["mkldnn"]
        torch.backends.cudnn.conv.fp32_precision = before["conv"]
        torch.backends.cudnn.rnn.fp32_precision = before["rnn"]
    assert flags() == before


def nothing():
    pass


def medium():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False


def newer_words():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def contradiction():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("said", [nothing, medium, newer_words, contradiction])
def test_precision_of_the_process_is_restored(said):
    with as_before():
        said()
        before = flags()
        readable = {name: value for name, value in before.items() if value != "contradiction"}
        for block, expected in ((fast_float32(GPU), FAST), (full_float32(), FULL)):
            with suppress(ZeroDivisionError), block:
                assert flags().items() >= expected.items()
                raise ZeroDivisionError
            assert flags().items() >= readable.items()


def test_blocks_nest():
    before = flags()
    with fast_float32(GPU):
        with full_float32():
            assert flags()["matmul"] == "highest"
        assert flags().items() >= FAST.items()
    assert flags() == before


def test_fast_float32_leaves_a_process_on_the_cpu_alone():
    before = flags()
    with fast_float32(torch.device("cpu")):
        assert flags() == before


def test_blocks_of_two_threads_do_not_mix():
    before, seen, inside = flags(), [], threading.Event()

    def compare():
        inside.set()
        with full_float32():
            seen.append(flags())

    other = threading.Thread(target=compare)
    with fast_float32(GPU):
        other.start()
        assert inside.wait(60)
        other.join(0.2)
        assert seen == []
        assert flags().items() >= FAST.items()
    other.join()
    assert seen[0].items() >= FULL.items()
    assert flags() == before


DEVICES = """
import json, logging, os, types
import torch
from inkdask.models import hardware

OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU."

def no_cuda():
    raise RuntimeError(OLD)

torch.cuda.is_available = lambda: False
torch.cuda.init = no_cuda
logging.basicConfig()
found = []
for cuda, gpus, visible in [
    ("13.0", 1, None), ("13.0", 1, "0"), ("13.0", 1, ""), ("13.0", 1, "-1"), ("13.0", 0, None),
    (None, 1, None), (None, 1, ""), (None, 0, None),
]:
    torch.version.cuda, os.environ["FAKE_GPUS"] = cuda, str(gpus)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    hardware._check_idle_gpu.cache_clear()
    for _ in range(2):
        try:
            found.append(str(hardware.device_for(types.SimpleNamespace(function=None))))
        except hardware.InkdaskError as error:
            found.append(str(error))
print(json.dumps(found))
"""


def test_idle_gpu_is_an_error_or_a_warning_unless_it_is_hidden(tmp_path):
    library = build_nvml(tmp_path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    sentence = (
        "This torch, built for CUDA 13.0, cannot use the stand-in with driver 580.00: The NVIDIA "
        "driver on your system is too old (found version 12020); install a newer driver, or torch "
        "for CUDA 12 with inkdask[cuda12], or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU."
    )
    assert found == [sentence] * 4 + ["cpu"] * 12
    warning = "The CPU runs and the stand-in does not: this torch is built without CUDA."
    assert done.stderr.count(warning) == 1
