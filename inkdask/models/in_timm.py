"""Registration of the networks with timm, by importing this module.

Afterwards ``timm.list_models("ink*")`` lists the networks, and ``timm.create_model(name,
layers=..., tile=...)`` builds one. Jobs do without timm, unless another package adds the network.
"""

import torch

if torch.version.cuda is None:
    # Two operators get a schema, because timm imports torchvision, and PyPI's torchvision does not
    # import beside a CPU-only torch without them. Nothing calls these operators.
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
