"""Builders of all networks by name; `inkdask.models.in_timm` registers them with timm.

They need no timm, because importing it takes every worker a second and a hundred megabytes. A
builder takes ``layers``, ``tile``, ``k`` and, for some networks, ``normalization``. Its network
reads tiles ``(b, 1, layers, tile, tile)`` and returns logits ``(b, 1, k, k)``.
"""

from collections.abc import Callable

from torch import nn

from inkdask.models.depth_cnn import ink_depth_cnn
from inkdask.models.hecate import ink_hecate_2_4um, ink_hecate_9_6um
from inkdask.models.hybrid_3d2d import ink_hybrid_3d2d
from inkdask.models.resnet3d import (
    ink_resnet3d_50,
    ink_resnet3d_101,
    ink_resnet3d_152,
    ink_resnet3d_152_decoder3d,
)
from inkdask.models.timesformer import ink_timesformer

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        ink_timesformer,
        ink_resnet3d_50,
        ink_resnet3d_101,
        ink_resnet3d_152,
        ink_resnet3d_152_decoder3d,
        ink_hecate_2_4um,
        ink_hecate_9_6um,
        ink_hybrid_3d2d,
        ink_depth_cnn,
    )
}
