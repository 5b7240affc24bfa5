"""Weights and volumes that follow from a name alone, and what upstream's networks make of them.

Every number comes from SHAKE-256 of ``"{seed}:{name}"``. The files in ``tests/golden`` are outputs
of the networks of the package `vesuvius` for these weights and volumes, in float32 on a CPU; maps
follow the rules of their model pages.
"""

import hashlib
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """Return the arrays of a file of upstream's outputs, by name."""
    with np.load(GOLDEN / f"{name}.npz") as kept:
        return dict(kept)


def tensor(name, shape):
    """Return the values of a weight, by its name in upstream's checkpoints."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    raw = hashlib.shake_256(f"0:{name}".encode()).digest(4 * math.prod(shape))
    u = (np.frombuffer(raw, "<u4") / 2**32).reshape(shape)
    if last == "running_var" or not shape:
        u = 0.5 + u
    elif last == "weight" and len(shape) == 1:
        u = (0.5 + u) * (0.25 if name.endswith("bn3.weight") else 1)
    elif len(shape) == 1:
        u = 0.2 * (u - 0.5)
    else:
        u = (2 * u - 1) * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(u, np.float32))


def state_of(module, rename):
    """Return weights for a network by upstream's names, which ``rename`` makes of the network's."""
    shapes = {rename(name): tuple(value.shape) for name, value in module.state_dict().items()}
    return OrderedDict((name, tensor(name, shape)) for name, shape in shapes.items())


def volume(name, shape, zeroed=None):
    """Return a volume uint8 (z, y, x): noise on a ramp, 0 where ``zeroed`` y0, y1, x0, x1 says."""
    raw = hashlib.shake_256(f"0:input:{name}".encode()).digest(math.prod(shape))
    noise = np.frombuffer(raw, np.uint8).astype(np.int64).reshape(shape)
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    values = ((3 * noise) // 4 + (7 * z + 3 * y + 5 * x) % 64).astype(np.uint8)
    if zeroed:
        y0, y1, x0, x1 = zeroed
        values[:, y0:y1, x0:x1] = 0
    return values


def of_hecate(name):
    """Return upstream's name of a weight of `Hecate`."""
    if name == "depth_coordinate_scale":
        return name
    inside = name.startswith(("decoder.", "normalization."))
    return f"canonical.{name}" if inside else f"canonical.backbone.{name}"


def hecate_file(tensors, fine):
    """Return the content of a checkpoint of Hecate, as upstream publishes it."""
    side, layers = (256, 64) if fine else (64, 16)
    unused = {"canonical.backbone.fc.weight": (3, 2048), "canonical.backbone.fc.bias": (3,)}
    unused |= {"canonical.decoder.aux_head_s1.conv.weight": (1, 128, 1, 1)}
    config = {
        "patch_size": [layers, side, side],
        "image_normalization": {"mode": "divide", "divisor": 200.0 if fine else 255.0},
    }
    return {
        "format_version": 1,
        "architecture_family": "hecate",
        "sampling_um": 2.4 if fine else 9.6,
        "weight_source": "ema_model",
        "config": config,
        "ema_model": tensors | {name: tensor(name, shape) for name, shape in unused.items()},
    }


def hybrid_file(tensors):
    """Return the content of a checkpoint of the hybrid, whose body stands twice in the file."""
    doubles = {}
    for name, value in tensors.items():
        for first, second in (("conv", "all_modules.0"), ("norm", "all_modules.1")):
            if f".{first}." in name:
                doubles[name.replace(f".{first}.", f".{second}.")] = value
    mad = {"mode": "robust_mad", "percentile_lower": 1.0, "percentile_upper": 99.0}
    config = {
        "model_type": "vesuvius_unet_3d_stem_2d",
        "patch_size": [17, 128, 128],
        "image_normalization": mad,
    }
    return {"model": tensors | doubles, "config": config, "step": 75000}
