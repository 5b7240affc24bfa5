"""All networks by name: importing this module registers them with timm, safely.

``timm.list_models("ink*")`` lists them, and ``timm.create_model(name, layers=..., tile=...)``
builds one. They read tiles ``(b, 1, layers, tile, tile)`` and return logits ``(b, 1, k, k)``.
"""

import torch

if torch.version.cuda is None:
    # PyPI's torchvision is built for CUDA and does not import beside a CPU-only torch, because two
    # operators lack a schema; timm imports torchvision. Nothing here ever calls the two.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _torchvision.define(
                f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )

from inkdask.models import depth_cnn, resnet3d, timesformer

__all__ = ["depth_cnn", "resnet3d", "timesformer"]
