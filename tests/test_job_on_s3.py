"""Test whole jobs on an S3 server: bytes read, regions, and faults."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

import inkdask
from inkdask import storage
from inkdask.errors import InkdaskError
from tests.files import read_picture
from tests.oracle import assert_same_picture, depth_slope, naive_map, papyrus, picture

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 610, 700
# Share of pixels off by 1: the stored grid has 16 bits, and tiles hardly overlap at stride 64.
ROUNDED = 2e-3

# Requests that a right allows, as the proxy sees them.
REQUESTS = {
    "s3:ListBucket": r"(GET|HEAD) /[^/]+/?(\?|$)",
    "s3:GetObject": r"(GET|HEAD) /[^/]+/[^?]",
    "s3:PutObject": r"PUT /[^/]+/[^?]|POST /[^/]+/[^?]+\?upload",
    "s3:DeleteObject": r"DELETE ",
}


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


@pytest.mark.slow
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


def policy():
    """Return the rights in the IAM policy of the cluster's README, by their resources."""
    text = (Path(__file__).parents[1] / "cluster" / "README.md").read_text()
    [found] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    rights = {}
    for statement in json.loads(found)["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            rights[action] = statement["Resource"]
    return rights


def allow(faults, rights):
    """Answer 403 to all requests but those that the rights allow."""
    allowed = "|".join(REQUESTS[right] for right in rights)
    faults.inject(["403"], match=f"^(?!{allowed})")


@pytest.mark.slow
def test_policy_of_the_readme_suffices(s3, faults, volume):
    rights = policy()
    assert rights.keys() == {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}
    assert not rights["s3:ListBucket"].endswith("/*")
    assert rights["s3:GetObject"] == rights["s3:PutObject"] == rights["s3:ListBucket"] + "/*"
    part = volume[:, :300, :400]
    upload(part, f"{s3}/seg", rowsperstrip=32)
    layers = set(storage.list_files(s3))
    job = {"model": depth_slope, "stride": 64, "zarr_output_dir": f"{s3}/partitions"}
    job["result_file"] = f"{s3}/result.txt"
    allow(faults, rights)
    inkdask.check(f"{s3}/seg", **job)
    assert set(storage.list_files(s3)) == layers
    for _ in range(2):  # the second replaces what it may not remove
        uri = inkdask.run(f"{s3}/seg", **job)
    expected = picture(naive_map(part, depth_slope, stride=64))
    assert_same_picture(read_picture(uri), expected, share=ROUNDED)
    assert storage.read_bytes(f"{s3}/result.txt").decode() == uri
    left = [key for key in storage.list_files(s3) if re.search(r"\.(test|part|unfinished)\b", key)]
    assert left == []
    assert {key.split("/")[0] for key in storage.list_files(s3)} == {
        "seg", "partitions", "result.txt"
    }  # fmt: skip
    inkdask.prepare(f"{s3}/seg", surface_volume_zarr=f"{s3}/volume.zarr")


@pytest.mark.parametrize("right", ["s3:ListBucket", "s3:GetObject", "s3:PutObject"])
def test_job_without_one_right_names_it(s3, faults, volume, right, tmp_path):
    upload(volume[:, :300, :400], f"{s3}/seg", rowsperstrip=32)
    allow(faults, {"s3:DeleteObject", *policy()} - {right})
    for job in (inkdask.check, inkdask.run):
        with pytest.raises(
            InkdaskError, match=rf"^Access to {s3}/seg.* is denied \({right}\): "
        ) as it:
            job(f"{s3}/seg", model=depth_slope, stride=64)
        assert str(it.value).endswith("set OUTPUT_PATH to another place.") == (
            right == "s3:PutObject"
        )
    assert not list(tmp_path.rglob("zarr.json"))
