"""The commands of the README are run from its own text, on a segment of the demo.

A command is run as it stands, but for words that stand for a reader's own: `places` has what they
are here. A word that is new, and in no rule, fails.
"""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import LocalCluster

import inkdask
from inkdask import cli, storage
from inkdask.demo import synthetic
from inkdask.models import registry, weights
from inkdask.models.timesformer import TimeSformer
from tests import bucket
from tests.files import grids

README = (Path(__file__).parents[1] / "README.md").read_text()
# Programs of others; tests of their own, and .ci/run, try what the README asks of them.
OTHERS = {"git", "cd", "python3", ".", "pip", "pytest", "docker", "jupyter", "python"}
SLOW = (
    "inkdask demo",
    "--cluster local",
    "inkdask sweep",
    "inkdask evidence",
)  # five seconds and more
LAYERS = 65


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Yield the words of each command in the blocks for a shell."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


OURS = [words for words in commands() if words[0] == "inkdask"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a segment as the demo makes it, of more layers, its prediction and grid."""
    place = tmp_path_factory.mktemp("readme")
    size = {"layers": LAYERS, "height": 128, "width": 320}
    synthetic.write_segment(place / "SEGMENT", text=("ΑΦΟΒΟΝ",), **size)
    outputs = {"zarr_output_dir": place / "grids", "result_file": place / "result.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))  # where the pace is kept
        inkdask.run(place / "SEGMENT", model="demo", **outputs)
    for file in (place / "SEGMENT" / "predictions").iterdir():
        file.rename(place / file.name)
    Path(*grids(str(place / "grids"))).rename(place / "GRID.zarr")
    return place


@pytest.fixture
def places(request, own_environment, folder, tmp_path, monkeypatch):
    """What stands here for words of a command, whose folder is made."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("INKDASK_CATALOGUE", str(write_catalogue(tmp_path / "open")))
    stand_in(tmp_path, monkeypatch)
    words = {"M": "demo", "N": "demo", "TRUTH.png": "SEGMENT/truth.png"}
    words["..."] = "SEGMENT --model demo"
    if "s3://" in request.node.nodeid or "python" in request.node.nodeid:
        bucket_uri = request.getfixturevalue("s3")
        for file in Path("SEGMENT", "layers").iterdir():
            storage.put_file(file, storage.join(bucket_uri, "segment", "layers", file.name))
        words["s3://bucket/segment"] = storage.join(bucket_uri, "segment")
    return words


def write_catalogue(root):
    """Write an open bucket that has the segment that the README names; return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        layers = synthetic.segment(text=("ΑΦ",), layers=26, height=128, width=320)[0]
        patch.setattr(bucket, "SAMPLE", "PHerc0139")
        patch.setattr(bucket, "TWO", "20260317000000")
        patch.setattr(bucket, "COARSE_LAYERS", (layers >> 8).astype("u1"))
        return bucket.write_bucket(root)


def stand_in(folder, patch):
    """Let the key of a model of the Hub name a small network of its kind on this disk."""

    def small(layers, tile, k, normalization=False):
        return TimeSformer(layers, tile, 16, 32, 2, 2, 16, normalization, k)

    patch.setitem(weights.BUILDERS, "ink_timesformer", small)
    torch.save({"state_dict": small(26, 64, 4).state_dict()}, folder / "timesformer.ckpt")
    key = "timesformer-scroll5"
    spec = replace(registry.known()[key], weights=str(folder / "timesformer.ckpt"))
    patch.setitem(registry.known(), key, spec)


def as_typed(words, places):
    """Return the words of a command with a reader's own in their places, and names of files."""
    placed = [part for word in words for part in shlex.split(places.get(word, word))]
    return [
        name for word in placed for name in (map(str, Path().glob(word)) if "*" in word else [word])
    ]


def test_readme_has_commands_of_ours_and_of_known_others():
    assert len(OURS) >= 15
    assert {words[0] for words in commands()} == {"inkdask"} | OTHERS
    assert {words[1] for words in OURS} >= {"run", "info", "reduce", "export", "sweep", "evidence"}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            words,
            id=" ".join(words[1:])[:60],
            marks=[pytest.mark.slow] * any(slow in " ".join(words) for slow in SLOW),
        )
        for words in OURS
    ],
)
def test_command_of_the_readme_runs(words, places, capsys):
    if "tcp://host:8786" in words:
        with LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address="") as at:
            cli.main(as_typed(words, {**places, "tcp://host:8786": at.scheduler_address})[1:])
    else:
        cli.main(as_typed(words, places)[1:])  # exits where it fails
    assert capsys.readouterr().out


def test_python_of_the_readme_runs(places):
    (block,) = blocks("python")
    for word, place in places.items():
        block = block.replace(f'"{word}"', f'"{place}"')
    names = {}
    exec(block, names)
    assert names["seg"].volume.shape[0] == 26
    assert names["ink"].map.dtype == "float32"
