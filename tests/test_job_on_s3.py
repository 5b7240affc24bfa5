"""Test whole jobs on an S3 server: bytes read, regions, and faults."""

import io

import numpy as np
import pytest
import tifffile

import inkdask
from inkdask import storage
from tests.files import read_picture
from tests.oracle import assert_same_picture, depth_slope, naive_map, papyrus, picture

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 610, 700
# Share of pixels off by 1: the stored grid has 16 bits, and tiles hardly overlap at stride 64.
ROUNDED = 2e-3


@pytest.fixture(scope="module")
def volume():
    return papyrus((5, HEIGHT, WIDTH))


def upload(volume, place, **layout):
    """Write uint16 layers to S3, and return their bytes."""
    size = 0
    for number, layer in enumerate(volume):
        file = io.BytesIO()
        tifffile.imwrite(file, layer.astype(np.uint16) << 8, **layout)
        storage.write_bytes(f"{place}/layers/{number:02d}.tif", file.getvalue())
        size += len(file.getvalue())
    return size


def read_by(job):
    before = storage.counters()
    result = job()
    return result, storage.counters() - before


@pytest.mark.parametrize("layout", [{"rowsperstrip": 32}, {"tile": (128, 128)}])
def test_job_reads_each_byte_about_once(s3, volume, layout):
    size = upload(volume, f"{s3}/seg", **layout)
    # The bytes of the stored grid count too, because the job reads it back from the local disk.
    uri, read = read_by(lambda: inkdask.run(f"{s3}/seg", model=depth_slope, stride=64))
    assert read.bytes_read <= 1.15 * size
    got = read_picture(uri)
    assert_same_picture(got, picture(naive_map(volume, depth_slope, stride=64)), share=ROUNDED)


def test_region_reads_only_its_share_of_the_bytes(s3):
    size = upload(papyrus((5, 1250, 1400)), f"{s3}/seg", tile=(128, 128))
    roi = (300, 400, 300 + 310, 400 + 280)  # 5 % of the area
    _, read = read_by(lambda: inkdask.run(f"{s3}/seg", model=depth_slope, stride=64, roi_xyxy=roi))
    assert read.bytes_read <= 0.15 * size


def test_job_gives_the_same_picture_through_faults(s3, faults, volume, capsys):
    part = volume[:, :300, :400]
    upload(part, f"{s3}/seg", rowsperstrip=4)
    expected = picture(naive_map(part, depth_slope, stride=64))
    faults.inject(["503", "reset", "500", "truncate"], every=25, latency=0.05)
    uri = inkdask.run(f"{s3}/seg", model=depth_slope, stride=64, zarr_output_dir=f"{s3}/partitions")
    happened = faults.injected()
    faults.inject()
    assert sum(happened.values()) > 0
    assert "retried" in capsys.readouterr().err
    got = read_picture(uri)
    assert_same_picture(got, expected, share=ROUNDED)
