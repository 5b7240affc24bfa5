"""Reading weights safely, and fitting them to their network exactly."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timesformer_pytorch import TimeSformer
from torch import Tensor, nn

import inkdask
from inkdask.errors import InkdaskError
from inkdask.models import registry, timesformer, weights
from inkdask.models.depth_cnn import DepthCNN
from inkdask.specs import ModelSpec, Network
from tests.oracle import naive_map, papyrus

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Give the weights of a demo network, none of them as initialised."""
    torch.manual_seed(0)
    module = DepthCNN()
    return {
        name: torch.rand(value.shape) if value.is_floating_point() else value + 3
        for name, value in module.state_dict().items()
    }


def resolved(path: Path, model_type: str = "depth-cnn", **values: Any) -> Network:
    return registry.resolve(str(path), model_type=model_type, **values)


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


# --- files as trainers write them


def save_safetensors(state: State, path: Path) -> None:
    save_file(state, path)


def save_state_dict(state: State, path: Path) -> None:
    torch.save(collections.OrderedDict(state), path)


def save_old_format(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_lightning(state: State, path: Path) -> None:
    prefixed = {f"model.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "state_dict": prefixed, "hyper_parameters": {"lr": 0.1}}, path)


def save_distributed(state: State, path: Path) -> None:
    prefixed = {f"module._orig_mod.backbone.{name}": value for name, value in state.items()}
    torch.save({"model_state_dict": prefixed}, path)


def save_parameters(state: State, path: Path) -> None:
    torch.save({name: nn.Parameter(value, False) for name, value in state.items()}, path)


SAVERS = [
    save_safetensors,
    save_state_dict,
    save_old_format,
    save_lightning,
    save_distributed,
    save_parameters,
]


@pytest.mark.parametrize("save", SAVERS)
def test_weights_of_every_layout_load(
    save: Callable[[State, Path], None], state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    save(state, path)
    module = weights.load(resolved(path))
    assert same(module.state_dict(), state)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("save", [save_safetensors, save_lightning])
def test_parameters_are_the_mapped_file(
    save: Callable[[State, Path], None], state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    save(state, path)
    module = weights.load(resolved(path))
    with Path("/proc/self/maps").open() as maps:
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in maps
            if line.endswith(f" {path}\n")
        ]
    for parameter in module.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans)


def test_half_precision_weights_become_float32(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({n: v.half() if v.is_floating_point() else v for n, v in state.items()}, path)
    module = weights.load(resolved(path))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    torch.testing.assert_close(module.state_dict(), state, rtol=1e-3, atol=1e-3)


def small_timesformer(layers: int, tile: int, k: int, normalization: bool = False) -> nn.Module:
    return timesformer.TimeSformer(layers, tile, 16, 32, 2, 2, 16, normalization, k)


def test_timesformer_checkpoint_with_normalization_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = TimeSformer(
        dim=32, image_size=64, patch_size=16, num_frames=26, num_classes=16, channels=1,
        depth=2, heads=2, dim_head=16,
    )  # fmt: skip

    monkeypatch.setitem(weights.BUILDERS, "ink_timesformer", small_timesformer)
    norm = nn.BatchNorm3d(1)
    norm.running_mean += 0.25
    path = tmp_path / "scroll5.ckpt"
    saved = {f"backbone.{name}": value for name, value in oracle.state_dict().items()}
    saved |= {f"normalization.{name}": value for name, value in norm.state_dict().items()}
    torch.save({"state_dict": saved, "hyper_parameters": {"size": 64, "with_norm": True}}, path)
    module = weights.load(resolved(path, "timesformer"))
    assert module.normalization.running_mean.item() == 0.25
    assert not any(value.is_meta for value in module.state_dict().values())
    tiles = torch.rand(1, 1, 26, 64, 64)
    with torch.inference_mode():
        logits = module(tiles)
        expected = oracle.eval()(norm.eval()(tiles).transpose(1, 2)).view(1, 1, 4, 4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [32, 96, 128])
def test_timesformer_checkpoint_predicts_in_tiles_of_another_size(
    tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    oracle = TimeSformer(
        dim=32, image_size=64, patch_size=16, num_frames=6, num_classes=16, channels=1,
        depth=2, heads=2, dim_head=16,
    ).eval()  # fmt: skip
    monkeypatch.setitem(weights.BUILDERS, "ink_timesformer", small_timesformer)
    path = tmp_path / "trained_at_64.pt"
    torch.save({f"backbone.{name}": value for name, value in oracle.state_dict().items()}, path)
    volume = papyrus((6, 140, 150), holes=False)
    options: dict[str, Any] = {"tile": tile, "stride": 32, "precision": "float32"}
    got = inkdask.predict(volume, path, model_in_chans=6, compile=False, **options).map.compute()

    def logits(x: Tensor) -> Tensor:
        return oracle(x.transpose(1, 2)).view(-1, 1, 4, 4)

    expected = naive_map(volume, logits, tile=tile, stride=32)
    assert expected.std() > 0.01
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_checkpoint_with_other_logits_than_described_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weights.BUILDERS, "ink_timesformer", small_timesformer)
    path = tmp_path / "trained_at_128.pt"
    torch.save(timesformer.TimeSformer(26, 128, 16, 32, 2, 2, 16).state_dict(), path)
    with pytest.raises(InkdaskError, match=r"gives 64 logits a tile, not 4 x 4: .*inkdask\.toml"):
        weights.load(resolved(path, "timesformer", tile=128))
    path.with_name("inkdask.toml").write_text("tile = 128")
    for tile in (64, 128):
        assert weights.load(resolved(path, "timesformer", tile=tile)).k == 8


def test_resnet3d_checkpoint_loads_without_its_training_heads() -> None:
    spec = ModelSpec("r", "ink_resnet3d_152_decoder3d", "")
    network = Network(spec, 62, 256, 64, 200, 200, "")
    plain = weights.build(network, weights.Checkpoint(Path("x"), {}))
    value = torch.ones(())
    saved = {
        name if name.startswith("decoder.") else f"backbone.{name}": value.expand(place.shape)
        for name, place in plain.state_dict().items()
    }
    training = ["backbone.fc.weight", "backbone.fc.bias", "decoder.aux_head_s1.weight"]
    for name in (*training, "decoder.aux_head_s2.weight"):
        saved[name] = value.expand(3)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for name in norm:
        saved[f"normalization.{name}"] = value if "num" in name else value.expand(1)
    checkpoint = weights.Checkpoint(Path("x"), saved)
    module = weights.fit(weights.build(network, checkpoint), checkpoint, spec.architecture)
    assert len(module.state_dict()) == len(saved) - 4
    assert all(value.eq(1).all() for value in module.state_dict().values())


@pytest.mark.parametrize("nest", ["model", "net", "state_dict_ema"])
def test_weights_under_the_name_of_a_training_script_load(
    state: State, tmp_path: Path, nest: str
) -> None:
    path = tmp_path / "weights.pt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({nest: state, "optimizer": optimizer, "epoch": 3}, path)
    assert same(weights.load(resolved(path)).state_dict(), state)


def test_two_sets_of_weights_are_refused(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": state, "model_ema": state}, path)
    with pytest.raises(InkdaskError, match=r"weights\.pt holds several sets .*, model, model_ema:"):
        weights.load(resolved(path))


def test_weights_for_training_alone_are_ignored(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    training = {"criterion.pos_weight": torch.ones(1), "n_averaged": torch.tensor(7)}
    torch.save({"state_dict": {f"module.{name}": w for name, w in state.items()} | training}, path)
    assert same(weights.load(resolved(path)).state_dict(), state)


def test_layer_named_like_a_classifier_is_not_ignored(state: State, tmp_path: Path) -> None:
    """Blocks with squeeze and excitation have layers named ``fc``."""
    path = tmp_path / "weights.pt"
    torch.save(state | {"depth.0.se.fc.weight": torch.ones(3)}, path)
    with pytest.raises(InkdaskError, match=r"1 unexpected, first depth\.0\.se\.fc\.weight"):
        weights.load(resolved(path))


def test_missing_step_counts_are_zero(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    counts = {name: torch.tensor(0) for name in state if name.endswith("num_batches_tracked")}
    torch.save({name: value for name, value in state.items() if name not in counts}, path)
    assert same(weights.load(resolved(path)).state_dict(), state | counts)


# --- hyper-parameters that hold other objects


class Colour(enum.Enum):
    RED = 1


class Config(dict):
    """As Lightning's AttributeDict."""


def test_checkpoint_with_other_objects_gives_its_tensors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "lightning.ckpt"
    others = {
        "namespace": argparse.Namespace(a=1),
        "config": Config(a=Config(b=[1, 2])),
        "path": Path("/data"),
        "enum": Colour.RED,
        "default": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2]),
        "set": {1, frozenset({2})},
        "numpy": np.float64(1.5),
        "array": np.arange(4),
        "dtype": np.dtype("float32"),
        "function": torch.nn.functional.relu,
        "class": nn.Linear,
        "simple": SimpleNamespace(a=torch.ones(2)),
        "bytes": b"abc",
        "big": 10**40,
        "slice": slice(1, 2),
        "in_chans": 26,
        5: "five",
    }
    torch.save({"hyper_parameters": others, "callbacks": {Colour: 1}, "state_dict": state}, path)
    checkpoint = weights.read(path)
    assert same(checkpoint.tensors, state)
    assert checkpoint.facts["in_chans"] == 26
    assert checkpoint.facts["big"] == 10**40
    assert same(weights.load(resolved(path)).state_dict(), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_dtypes_and_shared_storages_are_kept(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    base = torch.arange(24.0).view(4, 6)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool)
    saved = {str(kind): base.to(kind) for kind in kinds}
    saved |= {"base": base, "transposed": base.T, "corner": base[1:3, 2:4], "scalar": base[2, 3]}
    saved |= {"none": torch.empty(0, 3), "wide": torch.ones(3).expand(2, 3)}
    torch.save({"state_dict": saved, "other": Config()}, path, pickle_protocol=protocol)
    assert same(weights.read(path).tensors, saved)


# --- files that are not what they should be


def test_empty_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "empty.ckpt"
    path.touch()
    with pytest.raises(InkdaskError, match=rf"^The weights file {path} is empty\.$"):
        weights.read(path)


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("left", [0.1, 0.5, 0.999])
def test_truncated_file_is_reported(
    save: Callable[[State, Path], None], left: float, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    save(state, path)
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(InkdaskError, match=rf"^{path} is cut off or damaged"):
        weights.read(path)


def test_weights_in_a_folder_that_is_not_utf8_are_named(state: State, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(folder / "x.safetensors")
    with pytest.raises(InkdaskError, match="cannot be opened: its name is not UTF-8"):
        weights.read(folder / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<html>Not found</html>", "neither safetensors nor torch's own"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"\x80\x02}q\x00.", "is cut off or damaged, or no checkpoint at all"),
        (b"PK\x05\x06" + bytes(18), "is cut off or damaged, or no checkpoint at all"),
        (struct.pack("<Q", 2) + b"{}", "holds no weights"),
        (struct.pack("<Q", 100) + b"{}", "no whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "has a header of 4,611,686,018,427,387,904 bytes, and"),
    ],
)
def test_file_that_is_no_checkpoint_is_reported(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with pytest.raises(InkdaskError, match=sentence) as caught:
        weights.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (nn.Linear(1, 1), "holds a pickled object, not weights"),
        ([torch.ones(1)], "holds a list, not weights"),
        ({"epoch": 1, "state_dict": {}}, "holds no weights"),
        ({"a": torch.ones(2).to_sparse()}, "The weight a in .* is not a plain tensor"),
        ({"a": torch.ones(2, device="meta")}, "The weight a in .* is not a plain tensor"),
    ],
)
def test_torch_file_without_weights_is_reported(
    content: Any, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(InkdaskError, match=sentence):
        weights.read(path)


def test_weights_of_another_network_are_recognised(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(InkdaskError) as caught:
        weights.load(resolved(path, "timesformer"))
    sentence = str(caught.value)
    assert f"The weights {path} are not those of ink_timesformer: " in sentence
    assert "missing, first to_patch_embedding" in sentence or "missing, first cls_token" in sentence
    assert f"unexpected, first {next(iter(state))}" in sentence
    assert sentence.endswith("It looks like the weights of depth-cnn.")


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["backbone.layers.0.0.fn.to_qkv.weight"], "timesformer"),
        (["model.backbone.layer4.0.conv3.weight", "backbone.layer3.5.conv1.weight",
          "decoder.logit.weight"], "resnet3d-50"),
        (["layer4.0.conv3.weight", "layer3.22.conv1.weight", "decoder.logit.weight"],
         "resnet3d-101"),
        (["layer4.0.conv3.weight", "layer3.35.conv1.weight", "decoder.logit.weight"],
         "resnet3d-152"),
        (["layer4.0.conv3.weight", "layer3.35.conv1.weight",
          "decoder.decoder_blocks.0.conv1.weight"], "resnet3d-152-3d-decoder"),
        (["depth.0.0.weight", "plane.0.weight"], "depth-cnn"),
        (["layer4.0.conv3.weight", "layer3.40.conv1.weight", "decoder.logit.weight"], ""),
        (["fc.weight"], ""),
    ],
)  # fmt: skip
def test_network_is_recognised_by_the_names_of_weights(names: list[str], looks: str) -> None:
    known, unknown = f"It looks like the weights of {looks}.", "It is of no network known here."
    assert weights.recognise(names) == (known if looks else unknown)


def test_misshaped_weight_is_reported(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    name, value = next(iter(state.items()))
    torch.save(state | {name: value[:1]}, path)
    with pytest.raises(InkdaskError, match=rf"1 of another shape, first {name} \(1, .* for \("):
        weights.load(resolved(path))


def test_weight_given_twice_is_reported(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    name, value = next(iter(state.items()))
    torch.save(state | {f"module.{name}": value + 1}, path)
    with pytest.raises(InkdaskError, match=f"holds the weight {name} twice, with other values"):
        weights.load(resolved(path))


def test_equal_weights_under_two_names_are_one(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    name, value = next(iter(state.items()))
    torch.save(state | {f"module.{name}": value.clone()}, path)
    assert same(weights.load(resolved(path)).state_dict(), state)


def test_averaged_weights_win_over_those_of_the_last_step(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    last = {name: value + 1 for name, value in state.items()}
    torch.save({"model": last, "ema_model": state, "config": {}}, path)
    assert same(weights.load(resolved(path)).state_dict(), state)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_weights_for_other_layers_are_refused(
    save: Callable[..., None], state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    if save is save_file:
        save_file(state, path, {"in_chans": "30"})
    else:
        torch.save({"state_dict": state, "hyper_parameters": {"in_chans": 30}}, path)
    (tmp_path / "described").mkdir()
    shutil.copy(path, tmp_path / "described")
    (tmp_path / "described" / "inkdask.toml").write_text("layers = 20")
    for network, who in (
        (resolved(path), "inkdask's default says 26"),
        (resolved(path, layers=31), "MODEL_IN_CHANS says 31"),
        (resolved(tmp_path / "described"), "the model's description says 20"),
    ):
        with pytest.raises(InkdaskError) as caught:
            weights.load(network)
        assert str(caught.value) == (
            f"Channel mismatch: the checkpoint {network.model.weights} says 30 layers (in_chans), "
            f"and {who}; set MODEL_IN_CHANS=30."
        )
    assert weights.load(resolved(path, layers=30)) is not None


def test_weights_that_changed_after_resolving_are_refused(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    network = resolved(path)
    torch.save({name: value + 1 for name, value in state.items()}, path)
    with pytest.raises(InkdaskError, match="not those this job was made with"):
        weights.load(network)


def test_unknown_network_is_reported(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    network = resolved(path)
    spec = ModelSpec("x", "ink_nothing", str(path))
    with pytest.raises(InkdaskError, match=r"^There is no network ink_nothing: known are"):
        weights.load(Network(spec, 26, 64, 16, 200, 200, network.digest))


def test_reading_keeps_the_safe_globals_of_the_user(tmp_path):
    class Trusted:
        pass

    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with torch.serialization.safe_globals([Trusted]):
        weights.read(tmp_path / "w.pt")
        assert Trusted in torch.serialization.get_safe_globals()


def test_optimizer_state_is_not_taken_for_weights(tmp_path):
    torch.save({"state_dict": {}, "optimizer": {"m": torch.ones(1)}}, tmp_path / "w.pt")
    with pytest.raises(InkdaskError, match="holds no weights"):
        weights.read(tmp_path / "w.pt")
