"""The networks in timm's registry: importing this module registers them, safely.

``timm.list_models("ink*")`` lists them then, and ``timm.create_model(name, layers=..., tile=...)``
builds one. A job with a network of ours has no need of it.
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

from timm.models import register_model

from inkdask.models.networks import BUILDERS

for _build in BUILDERS.values():
    register_model(_build)
