"""The isotropic form of a scan of 2.4 um, as models of 9 um read it.

Its pixels are those of a level at a quarter of the width, and each of its layers is the mean of
four: 21 layers of the 84 about the middle. ``inkdask prepare`` writes it with the attributes of
villa's ``prepare_9um_isotropic_input.py``, whose arrays are recognised too.
"""

from __future__ import annotations

from typing import Any

from inkdask.errors import InkdaskError, SettingsError
from inkdask.reading.zarr_volume import ZarrSource
from inkdask.segment import Segment
from inkdask.settings import Settings

FACTOR, PLANES = 4, 84


def centre(segment: Segment, settings: Settings) -> Segment:
    """Return the layers that are averaged, where the settings ask for means of four.

    A range of layers that was asked for is averaged from its first layer on.
    """
    factor = settings.z_downsample_mean_factor
    source = segment.source
    if factor > 1 and isinstance(source, ZarrSource) and source.prepared_as:
        raise SettingsError(
            f"Z_DOWNSAMPLE_MEAN_FACTOR is {factor}, and the layers of {segment.uri} are means "
            f"already ({source.prepared_as}): leave it out."
        )
    if factor != FACTOR or settings.layers:
        return segment
    depth = len(segment.layers)
    if depth < PLANES:
        raise InkdaskError(
            f"{segment.uri} has {depth} layers, and Z_DOWNSAMPLE_MEAN_FACTOR={FACTOR} averages the "
            f"middle {PLANES}: set START_LAYER and END_LAYER to average others."
        )
    first = -(-(depth - PLANES) // 2)
    return segment.take(slice(first, first + PLANES))


def tags(whole: Segment, kept: Segment, factor: int) -> dict[str, Any]:
    """Return the attributes of an array of means of the layers that are kept."""
    if factor == 1:
        return {}
    first = whole.layers.index(kept.layers[0])
    depth = len(kept.layers)
    return {
        "format": f"level{whole.level}-zmean{factor}-{depth // factor}slice-v1",
        "source": whole.uri,
        "source_level": whole.level,
        "source_shape_zyx": list(whole.shape),
        "source_z_slice": [first, first + depth],
        "z_pool": str(factor),
    }
