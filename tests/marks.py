"""Marks of tests for which not every machine has the hardware.

A machine with a GPU computes there, so what is for CPUs is tested elsewhere.
"""

import pytest
import torch

from inkdask.models.hardware import has_int8, has_packed_bfloat16

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()

needs_vnni = pytest.mark.skipif(
    GPU or not has_int8(CPU), reason="needs a CPU with VNNI instructions, and no GPU"
)
needs_packing = pytest.mark.skipif(
    GPU or not has_packed_bfloat16(CPU), reason="needs a CPU for bfloat16, and no GPU"
)
