"""A stand-in for NVIDIA's management library, built from ``nvml.c``."""

import shutil
import subprocess
from pathlib import Path

import pytest


def build_nvml(folder):
    """Build the library in a folder, which then goes into LD_LIBRARY_PATH; or skip the test."""
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, name = Path(__file__).with_name("nvml.c"), "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
    subprocess.run(command, check=True)
    return folder
