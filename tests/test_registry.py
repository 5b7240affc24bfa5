"""What is known about models, and how a user's words become a network."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import inkdask
from inkdask.errors import InkdaskError
from inkdask.models import registry
from inkdask.specs import ModelSpec
from tests.files import bound_by_rights
from tests.oracle import naive_map, papyrus


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "mine.ckpt"
    path.write_bytes(b"weights")
    return path


def test_known_models_have_the_published_shapes() -> None:
    shapes = {
        key: (
            spec.architecture,
            spec.layers,
            spec.tile,
            spec.stride,
            spec.tile // spec.pixels_per_logit,
        )
        for key, spec in registry.KNOWN.items()
    }
    assert shapes == {
        "timesformer-scroll5": ("ink_timesformer", 26, 64, 16, 4),
        "timesformer_scroll5_27112024": ("ink_timesformer", 26, 64, 16, 4),
        "timesformer-gp-scroll1": ("ink_timesformer", 26, 64, 16, 4),
        "resnet3d-152-3d-decoder-2um": ("ink_resnet3d_152_decoder3d", 62, 256, 128, 64),
        "resnet50-3um": ("ink_resnet3d_50", 18, 256, 128, 64),
        "hecate-2.4um": ("ink_hecate_2_4um", 64, 256, 128, 64),
        "hecate-9.6um": ("ink_hecate_9_6um", 16, 64, 32, 64),
        "ink-9um": ("ink_hybrid_3d2d", 17, 128, 64, 128),
        "ink-9um-seed43": ("ink_hybrid_3d2d", 17, 128, 64, 128),
        "demo": ("ink_depth_cnn", 26, 64, 16, 16),
    }
    for key, spec in registry.KNOWN.items():
        assert spec.key == key
        assert spec.architecture in registry.ARCHITECTURES.values()
        assert spec.licence
        with pytest.raises(FrozenInstanceError):
            spec.tile = 1  # type: ignore[misc]


def test_file_of_a_known_repo_is_the_model_that_is_pinned_to_it() -> None:
    spec = registry._described("scrollprize/ink_9um:hybrid_3d2d-seed43/step-075000.pth", None)
    known = registry.KNOWN["ink-9um-seed43"]
    assert replace(spec, key=known.key) == known
    other = registry._described("scrollprize/hecate:hecate_9.6um.pth@main", None)
    assert (other.architecture, other.revision) == ("ink_hecate_9_6um", "main")
    assert other.sha256 is None  # because another revision may hold another file


def test_weights_with_another_digest_than_pinned_are_refused(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    pinned = ModelSpec("mine", "ink_depth_cnn", str(weights), sha256=digest)
    monkeypatch.setattr(registry, "known", lambda: {"mine": pinned})
    assert registry.resolve("mine").digest == digest
    weights.write_bytes(b"others")
    with pytest.raises(InkdaskError, match="mine.ckpt is not the file that model mine is pinned"):
        registry.resolve("mine")


def test_registry_does_not_import_torch() -> None:
    code = (
        "import sys; from inkdask.models import registry; registry.known();"
        "registry.resolve('demo'); print({'torch', 'timm', 'cupy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_name_of_the_scroll5_repo_is_a_key() -> None:
    known = registry.known()
    alias, key = known["timesformer_scroll5_27112024"], known["timesformer-scroll5"]
    assert replace(alias, key=key.key) == key


def test_demo_is_part_of_the_package() -> None:
    network = registry.resolve("demo")
    assert network.model.weights == "package://inkdask.models/demo.safetensors"
    assert (network.layers, network.tile, network.k) == (26, 64, 16)
    assert pickle.loads(pickle.dumps(network)) == network


def test_weights_file_is_resolved_by_its_path_and_digest(weights: Path) -> None:
    network = registry.resolve(str(weights))
    assert network.model == ModelSpec(str(weights), "ink_timesformer", str(weights))
    assert (network.layers, network.tile, network.k) == (26, 64, 4)
    assert (network.clip, network.divisor) == (200, 200)
    assert network.digest == hashlib.sha256(b"weights").hexdigest()
    weights.write_bytes(b"others")
    assert registry.resolve(str(weights)).digest == hashlib.sha256(b"others").hexdigest()


@pytest.fixture
def shelf() -> Iterator[Path]:
    """A folder with weights in it, which all users may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("first.ckpt", "second.ckpt"):
            (folder / file).write_bytes(b"weights")
        registry.resolve(str(folder / "first.ckpt"))  # imports what it needs, as root yet
        yield folder
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("ask", "path"),
    [
        (registry.resolve, "."),
        (registry.resolve, "second.ckpt"),
        (registry.resolve, "nothing.ckpt"),
    ],
)
def test_resolve_reports_a_folder_without_permission(
    ask: Callable[[str], Any], path: str, shelf: Path
) -> None:
    shelf.chmod(0)
    says = rf"^{re.escape(str(shelf / path))}: permission denied\.$"
    with bound_by_rights(), pytest.raises(InkdaskError, match=says):
        ask(str(shelf / path))


@pytest.mark.parametrize("name", ["second.ckpt", "second.toml"])
def test_resolve_reports_a_file_without_permission(name: str, shelf: Path) -> None:
    (shelf / name).touch()
    (shelf / name).chmod(0)
    with bound_by_rights(), pytest.raises(InkdaskError, match=rf"{name}: permission denied\.$"):
        registry.resolve(str(shelf / "second.ckpt"))


def test_weights_are_read_where_listing_is_forbidden(shelf: Path) -> None:
    shelf.chmod(0o711)
    with bound_by_rights():
        assert registry.resolve(str(shelf / "second.ckpt")).tile == 64


def test_relative_path_is_resolved_to_an_absolute_one(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)
    network = registry.resolve(weights.name)
    assert network.model.weights == str(weights)
    assert network.model.key == weights.name


def test_model_type_sets_the_shape(weights: Path) -> None:
    network = registry.resolve(str(weights), model_type="resnet3d-152-3d-decoder")
    assert network.model.architecture == "ink_resnet3d_152_decoder3d"
    assert (network.layers, network.tile, network.k, network.model.stride) == (62, 256, 64, 128)


def test_given_values_win_over_the_description(weights: Path) -> None:
    weights.with_suffix(".toml").write_text("layers = 30\ntile = 128\nclip = 255\ndivisor = 255\n")
    network = registry.resolve(
        str(weights), model_type="resnet3d-50", layers=20, tile=64, clip=100, divisor=50.5,
        precision="float32", batch_size=3, compile=False, compile_mode="default",
    )  # fmt: skip
    assert (network.layers, network.tile, network.k) == (20, 64, 16)
    assert (network.clip, network.divisor) == (100, 50.5)
    assert (network.precision, network.batch_size) == ("float32", 3)
    assert (network.compile, network.compile_mode) == (False, "default")
    # The model itself is as its maker describes it.
    assert (network.model.layers, network.model.tile) == (30, 128)


def test_logits_of_a_timesformer_are_as_many_for_any_tile(weights: Path) -> None:
    for tile in (16, 32, 64, 96, 128):
        assert registry.resolve(str(weights), tile=tile).k == 4
        assert registry.resolve(str(weights), model_type="resnet3d-50", tile=tile).k == tile // 4
    weights.with_suffix(".toml").write_text("tile = 128\npixels_per_logit = 32")
    assert registry.resolve(str(weights)).k == registry.resolve(str(weights), tile=48).k == 4


@pytest.mark.parametrize(
    ("model_type", "step", "tile"),
    [("timesformer", 16, 100), ("timesformer", 16, 8), ("resnet3d-50", 4, 102)],
)
def test_resolve_reports_a_tile_that_the_network_cannot_take(
    model_type: str, step: int, tile: int, weights: Path
) -> None:
    says = rf"^TILE_SIZE of model .* must be a multiple of {step} pixels, not {tile}\.$"
    with pytest.raises(InkdaskError, match=says):
        registry.resolve(str(weights), model_type=model_type, tile=tile)


def test_resolve_reports_an_unknown_model_and_the_known_ones() -> None:
    with pytest.raises(InkdaskError) as caught:
        registry.resolve("timesfomer")
    sentence = str(caught.value)
    assert sentence.startswith(
        "There is no model timesfomer: did you mean timesformer-scroll5? Known are "
    )
    assert all(key in sentence for key in registry.KNOWN)
    assert all(word in sentence for word in ("file", "Hugging Face", "s3://", "callable"))
    with pytest.raises(InkdaskError, match=r"^MODEL_TYPE must be one of timesformer, .*not resnet"):
        registry.resolve("demo", model_type="resnet")


# --- models that others add


SIDECAR = {"model_type": "resnet3d-50", "layers": 18, "divisor": 255, "licence": "CC0"}


@pytest.mark.parametrize("name", ["mine.toml", "mine.json", "inkdask.toml", "inkdask.json"])
@pytest.mark.parametrize("folder", [True, False])
def test_description_beside_weights_is_read(name: str, folder: bool, weights: Path) -> None:
    text = json.dumps(SIDECAR)
    if name.endswith(".toml"):
        text = "\n".join(f"{word} = {json.dumps(value)}" for word, value in SIDECAR.items())
    (weights.parent / name).write_text(text)
    network = registry.resolve(str(weights.parent if folder else weights))
    assert network.model.architecture == "ink_resnet3d_50"
    assert (network.layers, network.tile, network.divisor) == (18, 256, 255)
    assert network.model.licence == "CC0"
    assert network.model.weights == str(weights)


def test_description_named_like_the_weights_comes_first(weights: Path) -> None:
    weights.with_name("inkdask.toml").write_text("layers = 10")
    weights.with_suffix(".json").write_text('{"epochs": 5}')  # somebody else's
    assert registry.resolve(str(weights)).layers == 10
    weights.with_suffix(".json").write_text('{"layers": 11}')
    assert registry.resolve(str(weights)).layers == 11


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.json", "[" * 100_000),
        ("inkdask.json", '{"a":' * 100_000),
        ("mine.toml", "a = " + "[" * 5000),
    ],
)
def test_resolve_reports_a_description_nested_too_deeply(
    name: str, text: str, weights: Path
) -> None:
    path = weights.with_name(name)
    path.write_text(text)
    with pytest.raises(InkdaskError, match=rf"^The model description {path} cannot be read: "):
        registry.resolve(str(weights))


@pytest.mark.parametrize("place", ["os/x", "/x", ".models/x", "inkdask.models/"])
def test_resolve_reports_what_is_no_file_of_a_package(place: str) -> None:
    says = rf"^package://{re.escape(place)} names no file of a Python package\.$"
    with pytest.raises(InkdaskError, match=says):
        registry.resolve(f"package://{place}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layers = ", "cannot be read"),
        ("layers = 26\nframes = 26", "says 'frames'; it may say model_type, "),
        ("layers = 'many'", "layers must be a number above 0"),
        ("layers = 2.5", "layers must be a number above 0"),
        ("tile = 0", "tile must be a number above 0"),
        ("divisor = true", "divisor must be a number above 0"),
        ("divisor = inf", "divisor must be a number above 0 and up to 65535"),
        ("tile = 1_000_000_000", "tile must be a number above 0 and up to 65535"),
        ("licence = 1", "licence must be a text"),
    ],
)
def test_resolve_reports_a_wrong_description(text: str, sentence: str, weights: Path) -> None:
    path = weights.with_suffix(".toml")
    path.write_text(text)
    with pytest.raises(InkdaskError) as caught:
        registry.resolve(str(weights))
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


THEIR_MODULE = """
import torch
import inkdask.models.in_timm  # timm does not import beside every torchvision without it
from timm.models import register_model
from inkdask.specs import ModelSpec

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(1))

    def forward(self, x):
        return self.scale * torch.nn.functional.avg_pool2d(x.mean(2), 4)

@register_model
def their_network(layers, tile, **_):
    return Mean()

SHAPE = {"layers": 3, "tile": 16, "stride": 8, "pixels_per_logit": 4}
THEIRS = ModelSpec(
    "theirs", "their_network", "package://their_models/weights.safetensors", **SHAPE
)
MORE = [ModelSpec("more-1", "ink_timesformer", "them/1"), ModelSpec("more-2", "a", "them/2")]
CLASH = ModelSpec("demo", "their_network", "them/demo")
WRONG = {"key": "demo"}
"""
ENTRIES = """
[inkdask.models]
theirs = their_models:THEIRS
more = their_models:MORE
clash = their_models:CLASH
wrong = their_models:WRONG
gone = gone:MODEL
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Give a package that is installed, as pip does it, and adds models to inkdask."""
    folder = tmp_path_factory.mktemp("installed")
    for name, text in {
        "their_models/__init__.py": THEIR_MODULE,
        "their_models-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: their-models\n",
        "their_models-1.0.dist-info/entry_points.txt": ENTRIES,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    save_file({"scale": torch.tensor([3.0])}, folder / "their_models" / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        registry.known.cache_clear()
        yield importlib.import_module("their_models")
    registry.known.cache_clear()
    del sys.modules["their_models"]


def test_installed_package_adds_models_and_cannot_break_ours(installed: ModuleType) -> None:
    registry.known.cache_clear()
    with pytest.warns(UserWarning, match="are left out") as warned:
        known = registry.known()
    added = {spec.key: spec for spec in (installed.THEIRS, *installed.MORE)}
    assert known == registry.KNOWN | added
    reasons = [str(it.message) for it in warned if it.category is UserWarning]
    assert len(reasons) == 3
    for reason in ("the key demo is taken", "'key' is not a ModelSpec", "No module named 'gone'"):
        assert sum(reason in sentence for sentence in reasons) == 1


@pytest.mark.filterwarnings("ignore:Models of")
def test_model_of_an_installed_package_predicts(installed: ModuleType) -> None:
    volume = papyrus((3, 24, 40), holes=False)
    ink = inkdask.predict(volume, "theirs", precision="float32", compile=False)
    module = installed.Mean().requires_grad_(False)
    module.scale.fill_(3)
    expected = naive_map(volume, module, tile=16, stride=8)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Models of")
def test_architecture_of_an_installed_package_may_be_named(
    installed: ModuleType, weights: Path
) -> None:
    network = registry.resolve(str(weights), model_type="their_network")
    assert network.model.architecture == "their_network"
