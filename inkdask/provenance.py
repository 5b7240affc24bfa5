"""What shapes a result: the fingerprint of its tile grid, and the origin written beside it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from inkdask.plan import Plan
from inkdask.settings import Settings

FORMAT = 1  # of the stored grid; another number never resumes an older grid
SOFTWARE = ("inkdask", "torch", "dask", "zarr", "numpy")


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Everything that shapes the tile probabilities, and the chunks they are stored in.

    Two jobs with equal fingerprints share a stored grid. The window of the blend is not in it:
    a grid can be blended again with another one.
    """
    network, tiling = plan.network, plan.tiling
    return {
        "format": FORMAT,
        "input": plan.segment.identity if plan.segment else None,
        "layers": list(plan.layers),
        "averaged": len(plan.layers) // network.layers,
        "corner": list(plan.corner),
        "shape": list(tiling.shape),
        "model": network.model.key,
        "architecture": network.model.architecture,
        "weights": network.digest,
        "tile": tiling.tile,
        "stride": tiling.stride,
        "k": network.k,
        "clip": network.clip,
        "divisor": network.divisor,
        "precision": network.precision,
        "chunk": [tiling.y.step, tiling.x.step],
    }


def provenance(identity: Mapping[str, Any], plan: Plan, settings: Settings) -> dict[str, Any]:
    """The origin of a picture: for zarr attributes and PNG text. No secrets are in it."""
    return {
        "fingerprint": dict(identity),
        "source": plan.segment.uri if plan.segment else None,
        "mask": plan.segment.mask_uri if plan.segment else None,
        "roi_xyxy": settings.roi_xyxy,
        "blend_mode": settings.blend_mode,
        "gaussian_sigma": settings.gaussian_sigma,
        "software": {"python": platform.python_version(), **{p: version(p) for p in SOFTWARE}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
