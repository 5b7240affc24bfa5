"""Marks of tests for which not every machine has the hardware."""

import pytest
import torch

needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI instructions"
)
