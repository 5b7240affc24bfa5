"""Marks of tests for which not every machine has the hardware."""

import pytest
import torch

from inkdask.models.hardware import has_int8

needs_vnni = pytest.mark.skipif(
    not has_int8(torch.device("cpu")), reason="needs a CPU with VNNI instructions"
)
