"""Segments as the open bucket has them: over HTTP, on S3 and on disk, and its catalogue."""

import base64
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import inkdask
from inkdask import catalogue, storage
from inkdask.cautions import off_pixel_size
from inkdask.cli import main
from inkdask.errors import InkdaskError, SettingsError
from inkdask.information import describe
from inkdask.pictures.picture import open_picture
from inkdask.preflight import check_pixels
from inkdask.reading import pixel_size
from inkdask.segment import open_segment
from inkdask.specs import ModelSpec
from tests import bucket
from tests.bucket import COARSE, COARSE_LAYERS, FINE, LAYERS, NONE, ONE, SAMPLE, TWO
from tests.files import assert_reads, read_picture
from tests.jobs import network
from tests.oracle import depth_slope

SHARED = Path(__file__).parents[1].parent / "shared" / "fixtures" / "surface"


@pytest.fixture
def folder(tmp_path):
    return bucket.write_bucket(tmp_path / "bucket")


@pytest.fixture
def site(folder, monkeypatch, tmp_path):
    """The bucket over HTTP, as the catalogue's root, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with bucket.serving(folder) as site:
        monkeypatch.setenv("INKDASK_CATALOGUE", site.url)
        yield site


@pytest.fixture(params=["http", "refusing http", "s3", "local"])
def root(request, folder):
    """URI of the bucket in every way; a refusing server answers 403 to what is not there."""
    if request.param == "local":
        return str(folder)
    if request.param == "s3":
        uri = request.getfixturevalue("s3")
        bucket.upload(folder, uri)
        return uri
    site = request.getfixturevalue("site")
    site.missing = 403 if request.param == "refusing http" else 404
    return site.url


@pytest.mark.parametrize(
    "place", ["", "surface-volumes", f"surface-volumes/{FINE}.zarr", f"surface-volumes/{FINE}.tifs"]
)
def test_published_segment_is_read(root, place):
    if root.startswith("http") and place == "surface-volumes":
        pytest.skip("a folder without a name in the catalogue, and nothing is listed")
    segment = open_segment(storage.join(root, SAMPLE, "segments", ONE, *filter(None, [place])))
    assert segment.pixel_um == 2.4
    assert_reads(segment, LAYERS)


def test_volume_is_chosen_by_name_or_scan(root):
    uri = storage.join(root, SAMPLE, "segments", TWO)
    for words in (COARSE, f"{COARSE}.zarr", "9.362um", "20990101000001"):
        segment = open_segment(uri, volume=words)
        assert segment.uri == f"{uri}/surface-volumes/{COARSE}.zarr"
        assert segment.name == TWO
        assert segment.pixel_um == 9.362
    assert_reads(segment, COARSE_LAYERS)
    both = rf"{FINE}.zarr \(2.4 um, 6 layers\), {COARSE}.zarr \(9.362 um, 5 layers\)"
    with pytest.raises(SettingsError, match=f"VOLUME is not set: {uri} has several .*, {both};"):
        open_segment(uri)
    with pytest.raises(SettingsError, match=f"no surface volume 'x'; it has {both}"):
        open_segment(uri, volume="x")


def test_stack_is_taken_where_its_name_is_given(root):
    uri = storage.join(root, SAMPLE, "segments", ONE)
    segment = open_segment(uri, volume=f"{FINE}.tifs")
    assert segment.source.words.startswith("TIFF")
    assert_reads(segment, LAYERS)


def test_volume_of_a_coarser_level_is_ambiguous_by_its_scan(folder):
    volumes = folder / SAMPLE / "segments" / TWO / "surface-volumes"
    shutil.copytree(volumes / f"{COARSE}.zarr", volumes / f"{COARSE}-L1.zarr")
    uri = str(volumes.parent)
    with pytest.raises(SettingsError, match=r"-L1.zarr \(18.724 um, 5 layers\)"):
        open_segment(uri, volume="20990101000001")
    assert open_segment(uri, volume=f"{COARSE}-L1").pixel_um == 2 * 9.362
    assert open_segment(uri, volume=COARSE).pixel_um == 9.362


def test_labelled_folder_is_read(folder, tmp_path):
    volumes = folder / SAMPLE / "segments" / TWO / "surface-volumes"
    for name in ("surface-volume.zarr", "x_inklabels.zarr"):
        shutil.copytree(volumes / f"{COARSE}.zarr", tmp_path / "labelled" / name)
    assert_reads(open_segment(tmp_path / "labelled"), COARSE_LAYERS)


def test_volume_of_a_segment_without_any_is_refused(folder):
    with pytest.raises(SettingsError, match=r"VOLUME is 'x', and .* has no surface volumes\.$"):
        open_segment(folder / SAMPLE / "segments" / NONE, volume="x")


@pytest.mark.parametrize("words", [f"{SAMPLE}/{ONE[:8]}", f"PHercT/{ONE}", f"{SAMPLE}/{ONE[:14]}"])
def test_id_of_the_catalogue_is_located(site, words):
    segment = open_segment(words)
    assert segment.uri.startswith(f"{site.url}/{SAMPLE}/segments/{ONE}/surface-volumes/")
    assert_reads(segment, LAYERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{SAMPLE}/2099", rf"may be {SAMPLE}/{ONE[:14]}, {SAMPLE}/{TWO}, {SAMPLE}/{NONE[:14]}:"),
        (SAMPLE, f"may be {SAMPLE}/{ONE[:14]}"),
        (f"{SAMPLE}/3", f"is none of {SAMPLE}/{ONE[:14]}"),
        ("PHercOther/1", f"PHercOther is none of {SAMPLE} in the catalogue"),
        (f"{SAMPLE}/{NONE}", f"No layers found in .*{NONE}: it is neither a zarr nor a folder"),
    ],
)
def test_candidates_of_the_catalogue_are_named(site, words, message):
    with pytest.raises(InkdaskError, match=message) as caught:
        open_segment(words)
    assert "\n" not in str(caught.value)


def test_catalogue_is_fetched_once_until_it_changes(site, folder):
    for _ in range(2):
        catalogue._parse.cache_clear()  # as in another process
        assert [it.id for it in catalogue.read()] == [ONE[:14], TWO, NONE[:14]]
    gets = [path for method, path, _ in site.log if (method, path) == ("GET", "metadata.json")]
    assert len(gets) == 1
    told = bucket.catalogue()
    del told["samples"][SAMPLE]["segments"][TWO]
    (folder / "metadata.json").write_text(json.dumps(told))  # and not compressed this time
    assert [it.id for it in catalogue.read()] == [ONE[:14], NONE[:14]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"metadata\.json cannot be read \(JSONDecodeError"),
        (b"\x1f\x8b oops", r"metadata\.json cannot be read \(BadGzipFile|EOFError"),
        (b'{"samples": []}', "is no catalogue: it names no samples"),
        (None, r"metadata\.json does not exist"),
    ],
)
def test_damaged_catalogue_is_named(site, folder, data, message):
    (folder / "metadata.json").unlink()
    if data:
        (folder / "metadata.json").write_bytes(data)
    with pytest.raises(InkdaskError, match=message):
        open_segment(f"{SAMPLE}/{ONE}")
    with pytest.raises(InkdaskError, match=f"what else it holds is not known: .*{message}"):
        open_segment(f"{site.url}/{SAMPLE}/segments/{ONE}")


def test_info_lists_the_segments_of_a_scroll(site, capsys):
    main(["info", SAMPLE])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ") == [f"{SAMPLE}/{ONE[:14]}", lines[0].split("  ")[1]]
    assert f"{FINE}.zarr (2.4 um" in lines[0]
    assert f"{COARSE}.zarr (9.362 um" in lines[1]
    assert lines[2].endswith("no surface volumes")


def test_info_names_the_models_of_that_pixel_size(site, monkeypatch):
    from inkdask.models import registry

    fitting = inkdask.ModelSpec("mine", "ink_depth_cnn", "x", pixel_um=2.42)
    monkeypatch.setattr(registry, "known", dict)
    monkeypatch.setattr("inkdask.information.known", lambda: {"mine": fitting})
    rows = describe(SAMPLE)
    assert "(2.4 um, as of mine)" in rows[f"{SAMPLE}/{ONE[:14]}"]
    assert "(9.362 um)" in rows[f"{SAMPLE}/{TWO}"]
    assert describe(f"{SAMPLE}/{ONE[:14]}")["pixels"] == "2.4 um, as of mine"


@pytest.mark.parametrize("missing", [404, 403])
def test_job_over_http_leaves_its_picture_in_the_current_folder(
    own_tiles, site, tmp_path, monkeypatch, missing
):
    monkeypatch.chdir(tmp_path)
    site.missing, site.broken = missing, 5
    options = {"model": network, "tile": 64, "stride": 32, "model_in_chans": 6}
    uri = inkdask.run(f"{SAMPLE}/{ONE[:10]}", **options)
    assert Path(uri).parent == tmp_path
    local = site.root / SAMPLE / "segments" / ONE
    expected = inkdask.run(str(local), output_path=str(tmp_path / "local"), **options)
    np.testing.assert_array_equal(read_picture(uri), read_picture(expected))
    assert (
        storage.zarr_node(uri.replace(".png", ".zarr")).attrs["ome"]["multiscales"][0]["axes"][-1][
            "unit"
        ]
        == "micrometer"
    )


@pytest.mark.parametrize("name", [f"{FINE}.zarr", f"{FINE}.tifs"])
def test_reads_fetch_little_more_than_the_chunks(site, name):
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{name}"
    segment = open_segment(f"{site.url}/{place}")
    site.log.clear()
    assert_reads(segment, LAYERS)
    if name.endswith("zarr"):
        need = bucket.needed(site.root / place / "0")
    else:
        need = sum(file.stat().st_size for file in (site.root / place).iterdir())
    assert site.sent() <= 1.15 * need


def test_chunk_that_is_refused_is_empty_and_one_that_fails_is_an_error(site, monkeypatch):
    from inkdask.storage import s3

    monkeypatch.setattr(s3, "TRIES", 2)
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.zarr"
    (site.root / place / "0" / "0" / "0" / "2").unlink()
    expected = LAYERS.copy()
    expected[:, :128, 256:] = 0
    for site.missing in (404, 403):
        assert_reads(open_segment(f"{site.url}/{place}"), expected)
    segment = open_segment(f"{site.url}/{place}")
    (site.root / place / "0" / ".zarray").rename(site.root / "hidden")  # the right is lost
    with pytest.raises(InkdaskError, match="cannot be read at rows 0 to .*403"):
        segment.volume.compute(scheduler="synchronous")
    (site.root / "hidden").rename(site.root / place / "0" / ".zarray")
    site.broken = 1
    with pytest.raises(InkdaskError, match=r"cannot be read at rows 0 to .*: HTTP 503"):
        segment.volume.compute(scheduler="synchronous")


@pytest.mark.parametrize("status", [204, 300, 304, 405])
def test_answer_over_http_that_is_no_file_is_an_error(site, status):
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.zarr"
    segment = open_segment(f"{site.url}/{place}")
    (site.root / place / "0" / "0" / "0" / "2").unlink()
    site.missing = status
    with pytest.raises(InkdaskError, match=rf"\.zarr.*: HTTP {status} "):
        segment.volume.compute(scheduler="synchronous")
    with pytest.raises(InkdaskError, match=rf"/0/0/0/2: HTTP {status} "):
        storage.read_bytes(f"{site.url}/{place}/0/0/0/2")


def test_server_with_a_password_takes_it_from_netrc(site, tmp_path, monkeypatch):
    place = f"{site.url}/{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.zarr"
    site.login = "Basic " + base64.b64encode(b"reader:marked-secret").decode()
    with pytest.raises(InkdaskError, match=r"asks for a user and a password: .*\.netrc"):
        open_segment(place)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login reader password marked-secret")
    monkeypatch.setenv("NETRC", str(netrc))
    assert_reads(open_segment(place), LAYERS)


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("https://reader:marked-secret@127.0.0.1:9/segment", r"\.netrc"),
        ("https://marked-secret@127.0.0.1:9/segment", r"\.netrc"),
        ("https://127.0.0.1:9/a?x=1&X-Amz-Signature=marked-secret&y=2", "save the file"),
        ("https://127.0.0.1:9/a?token=marked-secret", "save the file"),
        ("s3://key:marked-secret@bucket/segment", "AWS_"),
    ],
)
def test_password_in_a_uri_is_refused_and_never_shown(uri, instead, tmp_path, capfd):
    file = str(tmp_path / "x")
    for words in (
        ["info", uri], ["check", uri, "--model", "demo"], ["run", uri, "--model", "demo", "-v"],
        ["run", file, "--model", uri], ["prepare", uri], ["evidence", uri],
        ["export", uri, "--to", f"{file}.png"], ["sweep", uri, "--model", "demo"],
        ["demo", "--out", uri],
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="1|2"):
            main(words)
        said = capfd.readouterr()
        assert said.err.startswith("inkdask: "), words  # the command itself is right
        assert "marked-secret" not in said.out + said.err, words
    with pytest.raises(InkdaskError, match=f"with a password or signature .*{instead}") as caught:
        open_segment(uri)
    assert "marked-secret" not in str(caught.value)


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("tag", ['"{}"', 'W/"{}"'])
def test_layer_over_http_that_was_replaced_is_an_error(site, is_strict, tag):
    site.is_strict, site.tag = is_strict, tag
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.tifs"
    segment = open_segment(f"{site.url}/{place}")
    assert_reads(segment, LAYERS)
    file = site.root / place / "03.tif"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InkdaskError, match=r"03\.tif has changed since it was opened"):
        segment.volume.compute(scheduler="synchronous")


def test_refused_chunk_of_a_picture_is_empty(site):
    pixels = np.zeros((64, 96), np.uint8)
    pixels[:32] = 7  # the chunks below are not stored
    array = zarr.create_array(site.root / "p.zarr", shape=(64, 96), chunks=(32, 32), dtype="u1")
    array[:] = pixels
    for site.missing in (404, 403):
        picture = open_picture(f"{site.url}/p.zarr").levels[0]
        np.testing.assert_array_equal(picture.compute(scheduler="synchronous"), pixels)


def test_refused_chunk_on_s3_is_empty(s3, folder, faults):
    bucket.upload(folder, s3)
    uri = storage.join(s3, SAMPLE, "segments", ONE, "surface-volumes", f"{FINE}.zarr")
    segment = open_segment(uri)
    faults.inject(["403"], match="GET .*/0/0/0/2")
    expected = LAYERS.copy()
    expected[:, :128, 256:] = 0
    assert_reads(segment, expected)
    faults.inject(["expired"], match="GET .*/0/0/0/2")
    with pytest.raises(InkdaskError, match="ExpiredToken"):
        segment.volume.compute(scheduler="synchronous")
    faults.inject(["403"], match="GET")
    with pytest.raises(InkdaskError, match="cannot be read at rows 0 to"):
        segment.volume.compute(scheduler="synchronous")


def test_layer_that_is_missing_in_the_middle_is_named_over_http(site):
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.tifs"
    (site.root / place / "03.tif").unlink()
    with pytest.raises(InkdaskError, match="Layer 03 missing"):
        open_segment(f"{site.url}/{place}")


def test_layers_of_many_digits_and_legacy_folders_are_read_over_http(site):
    for path, digits in (("old/layers", 2), ("deep.tifs", 3)):
        for number in range(40):
            file = site.root / path / f"{number:0{digits}d}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(
                site.root
                / SAMPLE
                / "segments"
                / ONE
                / "surface-volumes"
                / f"{FINE}.tifs"
                / "02.tif",
                file,
            )
    for place in ("old", "old/layers", "deep.tifs"):
        assert open_segment(f"{site.url}/{place}").layers == tuple(range(40))


def test_output_over_http_is_refused(own_tiles, site):
    with pytest.raises(InkdaskError, match=r"cannot be written: .* set OUTPUT_PATH"):
        inkdask.check(f"{SAMPLE}/{ONE}", model=network, output_path=site.url)


def test_picture_of_a_public_bucket_goes_to_the_current_folder(
    s3, folder, own_tiles, monkeypatch, tmp_path
):
    bucket.upload(folder, s3)
    uri = storage.join(s3, SAMPLE, "segments", ONE)
    assert inkdask.check(uri, model=network).startswith(f"{uri}/predictions/")
    monkeypatch.setattr(storage, "has_credentials", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert Path(inkdask.check(uri, model=network)).parent == tmp_path


def test_reduce_takes_the_job_of_the_volume(folder, own_tiles):
    uri = str(folder / SAMPLE / "segments" / TWO)
    options = {"model": network, "tile": 32, "stride": 32}
    pictures = {
        volume: read_picture(
            inkdask.run(uri, volume=volume, model_in_chans=layers, layers=(0, layers), **options)
        )
        for volume, layers in ((FINE, 5), (COARSE, 5))
    }
    for volume, picture in pictures.items():
        again = inkdask.reduce(uri, volume=volume, model=network, layers=(0, 5))
        np.testing.assert_array_equal(read_picture(again), picture)


# Defects of published surface volumes.


@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_with_an_order_and_half_a_codec_are_read(folder, order):
    """As the renderer of June 2026 wrote them."""
    import numcodecs

    array = folder / SAMPLE / "segments" / TWO / "surface-volumes" / f"{COARSE}.zarr" / "0"
    told = json.loads((array / ".zarray").read_text())
    told |= {"dtype": f"{order}u1", "compressor": {"id": "blosc", "clevel": 3}}
    told["dimension_separator"] = "."
    (array / ".zarray").write_text(json.dumps(told))
    chunk = (array / "0" / "0" / "0").read_bytes()
    shutil.rmtree(array / "0")
    (array / "0.0.0").write_bytes(numcodecs.Blosc("zstd", 3, 1).encode(chunk))
    assert_reads(open_segment(array.parent), COARSE_LAYERS)


@pytest.mark.parametrize("kind", ["http", "local"])
def test_array_of_headers_alone_is_refused(site, kind):
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.zarr"
    shutil.rmtree(site.root / place / "1" / "0")
    root = site.url if kind == "http" else str(site.root)
    with pytest.raises(InkdaskError, match=r"zarr/1 has a header and no chunks: name another"):
        open_segment(f"{root}/{place}", level="1")
    assert_reads(open_segment(f"{root}/{place}"), LAYERS)


def test_level_that_is_declared_and_missing_is_named(root):
    uri = storage.join(root, SAMPLE, "segments", ONE, "surface-volumes", f"{FINE}.zarr")
    for level, message in (("1", ""), ("2", "has no level '2'; it has 0, 1")):
        if message:
            with pytest.raises(InkdaskError, match=message):
                open_segment(uri, level=level)
        else:
            assert open_segment(uri, level=level).pixel_um == 4.8


def test_level_without_files_is_named(folder):
    group = folder / SAMPLE / "segments" / ONE / "surface-volumes" / f"{FINE}.zarr"
    shutil.rmtree(group / "1")
    with pytest.raises(InkdaskError, match=r"zarr/1 does not exist"):
        open_segment(group, level="1")
    (group / "0" / ".zarray").unlink()
    with pytest.raises(InkdaskError, match=r"zarr/0 is no zarr array"):
        open_segment(group)


def test_levels_with_other_codecs_are_read(folder):
    group = folder / SAMPLE / "segments" / ONE / "surface-volumes" / f"{FINE}.zarr"
    file = group / "1" / ".zarray"
    told = json.loads(file.read_text())
    file.write_text(
        json.dumps(told | {"compressor": {"id": "gzip", "level": 1}, "fill_value": None})
    )
    for chunk in (group / "1" / "0").rglob("?"):
        if chunk.is_file():
            chunk.write_bytes(gzip.compress(chunk.read_bytes()))
    assert_reads(open_segment(group, level="1"), LAYERS[:, ::2, ::2])


@pytest.mark.parametrize("codec", ["vcz1", "vc-delta3d"])
def test_codec_that_is_not_public_is_named(folder, codec):
    file = folder / SAMPLE / "segments" / ONE / "surface-volumes" / f"{FINE}.zarr" / "0" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"compressor": {"id": codec}}))
    with pytest.raises(InkdaskError, match=f"cannot be read .*{codec}"):
        open_segment(file.parent)


def test_chunk_that_is_too_short_is_an_error(site):
    place = f"{SAMPLE}/segments/{ONE}/surface-volumes/{FINE}.zarr"
    chunk = site.root / place / "0" / "0" / "0" / "0"
    segment = open_segment(f"{site.url}/{place}")
    chunk.write_bytes(chunk.read_bytes()[:1000])
    with pytest.raises(InkdaskError, match="cannot be read at rows"):
        segment.volume.compute(scheduler="synchronous")


@pytest.mark.parametrize(
    ("name", "um"),
    [
        (f"{FINE}.zarr", 2.4),
        (f"{FINE}-L2.zarr", 9.6),
        ("20250728140407-9.362um-1.2m-113keV-masked", 9.362),
        ("7.91um", 7.91),
        ("20230702185753", None),
        ("album3um2", None),
    ],
)
def test_pixel_size_of_a_name(name, um):
    assert pixel_size.of_name(name) == um


@pytest.mark.parametrize(
    ("unit", "scale", "group", "um"),
    [
        ("micrometer", 7.91, 0, 7.91),
        ("nanometer", 2400.0, 0, 2.4),
        ("nanometer", 1.0, 0, None),
        ("micrometer", 1.0, 0, None),
        ("nanometer", 2.4, 0, None),
        ("meter", 7.91, 0, None),
        ("micrometer", 2.4, 2, None),
        (None, 7.91, 0, None),
    ],
)
def test_pixel_size_of_metadata_is_taken_where_it_is_plausible(tmp_path, unit, scale, group, um):
    transformations = [{"type": "scale", "scale": [1.0, scale, scale]}]
    bucket.write_group(
        tmp_path / "x.zarr", COARSE_LAYERS, scale=transformations, unit=unit, source_group=group
    )
    found = open_segment(tmp_path / "x.zarr").pixel_um
    assert found == (um and pytest.approx(um))


def test_name_wins_over_metadata(tmp_path):
    scale = [{"type": "scale", "scale": [1.0, 7.91, 7.91]}]
    bucket.write_group(tmp_path / f"{FINE}.zarr", COARSE_LAYERS, scale=scale, unit="micrometer")
    assert open_segment(tmp_path / f"{FINE}.zarr").pixel_um == 2.4


def test_other_pixel_size_warns_or_is_refused(folder):
    mine = ModelSpec("mine", "ink_timesformer", "", pixel_um=2.4)
    for found in (None, 2.4, 2.44, 2.36):
        assert off_pixel_size(found, mine) is None
    assert off_pixel_size(9.362, replace(mine, pixel_um=None)) is None
    (says,) = {off_pixel_size(9.362, replace(mine, pixel_um=9.6)).sentence}
    assert says.startswith("Pixels of 9.362 um: model mine was trained at 9.6 um")
    plan = inkdask.predict(folder / SAMPLE / "segments" / TWO, depth_slope, volume=COARSE).plan
    check_pixels(plan, None)
    strict = replace(plan.network, model=replace(mine, architecture="ink_hecate_2_4um"))
    with pytest.raises(SettingsError, match=r"at 2.4 um, and refuses others: name a surface vol"):
        check_pixels(replace(plan, network=strict), None)


# The isotropic form.


def upstream(planes):
    """What villa's prepare_9um_isotropic_input.py makes of uint8 (z, y, x), in its own words."""
    first = int(np.ceil((len(planes) - 84) / 2))
    chosen = planes[first : first + 84].astype(np.float32)
    return np.rint(chosen.reshape(21, 4, *planes.shape[1:]).mean(axis=1)).astype(np.uint8)


@pytest.fixture(params=[84, 85, 109])
def deep(request, tmp_path):
    """A group of three levels and a number of layers, named as a scan of 2.4 um."""
    planes = np.random.default_rng(5).integers(1, 256, (request.param, 288, 300), np.uint8)
    return bucket.write_group(tmp_path / f"{FINE}.zarr", planes, levels=3), planes[:, ::4, ::4]


MEANS = {"ome_zarr_level": "2", "z_downsample_mean_factor": 4}


@pytest.mark.parametrize(("wanted", "first"), [(21, 0), (17, 2), (16, 2)])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_isotropic_form_is_read_lazily(deep, own_tiles, wanted, first, is_reversed):
    group, planes = deep
    options = {"model_in_chans": wanted, "force_reverse": is_reversed, "tile": 32, "stride": 32}
    ink = inkdask.predict(group, network, **MEANS, **options)
    expected = upstream(planes)[first : first + wanted]
    volume = ink.plan.volume.compute(scheduler="synchronous")
    np.testing.assert_array_equal(volume, expected[::-1] if is_reversed else expected)
    assert ink.plan.segment.pixel_um == pytest.approx(9.6)


def test_prepared_isotropic_form_has_its_tags_and_is_recognised(deep, own_tiles, tmp_path):
    group, planes = deep
    uri = inkdask.prepare(group, **MEANS)
    segment = open_segment(uri)
    assert_reads(segment, upstream(planes))
    assert segment.pixel_um == pytest.approx(9.6)
    assert segment.source.prepared_as == "level2-zmean4-21slice-v1"
    first = -(-(len(planes) - 84) // 2)
    assert (
        storage.zarr_array(uri).attrs.asdict()
        | {
            "format": "level2-zmean4-21slice-v1",
            "source": str(group),
            "source_level": "2",
            "source_shape_zyx": list(planes.shape),
            "source_z_slice": [first, first + 84],
            "z_pool": "4",
        }
        == storage.zarr_array(uri).attrs.asdict()
    )
    with pytest.raises(SettingsError, match="are means already .*leave it out"):
        inkdask.predict(uri, network, z_downsample_mean_factor=4)
    options = {"model": network, "tile": 32, "stride": 32, "model_in_chans": 17}
    direct = inkdask.run(group, output_path=str(tmp_path / "direct"), **MEANS, **options)
    prepared = inkdask.run(uri, output_path=str(tmp_path / "prepared"), **options)
    np.testing.assert_array_equal(read_picture(direct), read_picture(prepared))


def test_array_that_upstream_prepared_is_recognised(tmp_path):
    tags = {"format": "level2-zmean4-21slice-v1", "source_level": "2", "z_pool": "4"}
    group = bucket.write_group(
        tmp_path / "x.zarr", COARSE_LAYERS, source=f"s3://bucket/{FINE}.zarr/", **tags
    )
    segment = open_segment(group)
    assert segment.pixel_um == pytest.approx(9.6)
    with pytest.raises(SettingsError, match="level2-zmean4-21slice-v1"):
        inkdask.predict(group, network, z_downsample_mean_factor=4)


def test_isotropic_form_of_few_layers_is_refused(folder, own_tiles):
    uri = folder / SAMPLE / "segments" / ONE
    with pytest.raises(InkdaskError, match="has 6 layers, and Z_DOWNSAMPLE_MEAN_FACTOR=4 averages"):
        inkdask.predict(uri, network, z_downsample_mean_factor=4)
    ink = inkdask.predict(uri, network, layers=(1, 5), z_downsample_mean_factor=4, tile=32)
    mean = np.rint(LAYERS[1:5].astype(np.float32).mean(axis=0)).astype(np.uint8)
    np.testing.assert_array_equal(ink.plan.volume.compute(scheduler="synchronous")[0], mean)


# The fixtures that lie beside a checkout of the whole project.


@pytest.mark.skipif(not SHARED.exists(), reason="no shared fixtures beside this checkout")
@pytest.mark.parametrize("missing", [404, 403])
def test_shared_fixture_is_read(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with np.load(SHARED / "expected" / "default.npz") as file:
        expected = file["layers"]
    assert_reads(open_segment(SHARED / "variants" / "renderer-of-june-2026.zarr"), expected)
    with bucket.serving(SHARED / "site") as site:
        site.missing, site.broken = missing, 5
        monkeypatch.setenv("INKDASK_CATALOGUE", site.url)
        for volume in (None, "2.400um-0.22m-77keV-volume-20990101000000.tifs"):
            segment = open_segment("PHercTest1/20990102030405", volume=volume)
            assert segment.pixel_um == 2.4
            assert_reads(segment, expected)
