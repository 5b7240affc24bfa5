"""Callables as models: what may be one, and which edits its digest notices."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import inkdask
from inkdask.errors import InkdaskError
from inkdask.models import registry
from inkdask.plan import Plan
from inkdask.settings import Settings
from tests.files import own_messages, write_layers


def quarter(x: Tensor) -> Tensor:
    return x.mean(dim=2)[:, :, ::16, ::16]


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.amax(dim=2)[:, :, ::2, ::2]


@dataclass
class Times:
    """A callable without a hash, as each dataclass that may change is."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * x.mean(dim=2)[:, :, ::16, ::16]


@pytest.mark.usefixtures("own_environment")
def test_callable_without_a_hash_runs_a_job(tmp_path: Path, capsys: Any) -> None:
    write_layers(tmp_path / "seg" / "layers", np.full((3, 70, 80), 200, np.uint8))
    assert Path(inkdask.run(tmp_path / "seg", model=Times(3.0))).exists()
    assert "100 % of the papyrus above 0.5" in capsys.readouterr().err


def test_function_is_tried_on_one_tile() -> None:
    network = registry.resolve(quarter, layers=5, tile=32)
    assert (network.layers, network.tile, network.k) == (5, 32, 2)
    assert network.function is quarter
    assert network.model.key == "quarter"
    assert network.model.pixels_per_logit == 16
    assert registry.resolve(quarter).digest == network.digest
    assert registry.resolve(lambda x: quarter(x) + 1).digest != network.digest


def test_module_and_numpy_function_are_models() -> None:
    network = registry.resolve(Half().eval())
    assert (network.model.key, network.k) == ("Half", 32)
    assert registry.resolve(lambda x: np.zeros((1, 1, 8, 8), np.float32)).k == 8


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x, r"of shape \(1, 1, k, k\) for .* not shape \(1, 1, 26, 64, 64\)\.$"),
        (lambda x: x[:, :, 0, :4, :8], r"not shape \(1, 1, 4, 8\)\.$"),
        (lambda x: x.mean(), r"not shape \(\)\.$"),
        (lambda x: "ink", r"not str\.$"),
        (lambda x: torch.zeros(1, 1, 65, 65), r"not shape \(1, 1, 65, 65\)\.$"),
        (lambda x: 1 / 0, r"failed on a tile of shape .*: ZeroDivisionError: division by zero\.$"),
        (Half(), r"^The model Half is in training mode: call its eval\(\) first\.$"),
    ],
)
def test_function_that_gives_no_logits_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(InkdaskError, match=sentence):
        registry.resolve(model)


def test_function_that_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(InkdaskError, match="cannot travel to workers"),
    ):
        registry.resolve(lambda x: (quarter(x), log)[0])


# --- digests

# A module of the user's own, and the ways in which a model may use it. The code of `MODELS` is
# pickled by value, as a notebook's is.
HELPER = """
def toy(x):
    return {factor} * x.mean((2, 3, 4))[..., None, None]

class Toy:
    def __call__(self, x):
        return toy(x)

    def forward(self, x):
        return toy(x)
"""
MODELS = """
import functools
import {helper}
from {helper} import Toy, toy

def calling(x):
    return toy(x)

def importing(x):
    return {helper}.toy(x)

def alone(x):
    return x.mean((2, 3, 4))[..., None, None]

models = {{
    "function": toy,
    "instance": Toy(),
    "bound method": Toy().forward,
    "partial": functools.partial(toy),
    "partial of a call": functools.partial(calling),
    "call": calling,
    "module": importing,
    "alone": alone,
}}
"""
USING = ("function", "instance", "bound method", "partial", "partial of a call", "call", "module")
DIGESTS = """
import json, sys
from inkdask.models import registry
from tests.test_callables import models_of
digest = lambda model, version: registry.resolve(model, layers=2, tile=8, version=version).digest
models = models_of(sys.argv[1])
print(json.dumps([{name: digest(model, v) for name, model in models.items()} for v in (None, "1")]))
"""


def models_of(helper: str) -> dict[str, Callable[[Any], Any]]:
    """Return models that use the module ``helper``, and one that does not, by name."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(MODELS.format(helper=helper), "<a notebook's cell>", "exec"), scope)
    return scope["models"]


def digest(model: Callable[[Any], Any], version: str | None = None) -> str:
    return registry.resolve(model, layers=2, tile=8, version=version).digest


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the file of the module ``helper``, which can be imported."""
    path = tmp_path / "helper.py"
    path.write_text(HELPER.format(factor=1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which knows an edit by its second
    sys.modules.pop("helper", None)
    yield path
    sys.modules.pop("helper", None)


def edit(path: Path) -> None:
    """Edit a module, and forget that it was imported."""
    path.write_text(HELPER.format(factor=2))
    sys.modules.pop(path.stem)
    importlib.invalidate_caches()


def test_digest_changes_when_an_imported_module_is_edited(helper: Path) -> None:
    before = {name: digest(model) for name, model in models_of("helper").items()}
    assert {name: digest(model) for name, model in models_of("helper").items()} == before
    edit(helper)
    after = {name: digest(model) for name, model in models_of("helper").items()}
    assert [name for name in before if before[name] == after[name]] == ["alone"]


@pytest.mark.slow
def test_digest_in_another_process_is_the_same_under_a_version(helper: Path) -> None:
    models = models_of("helper")
    here = [{name: digest(model, v) for name, model in models.items()} for v in (None, "1")]
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(helper.parent)!r})\n{DIGESTS}",
         "helper"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    unversioned, versioned = json.loads(out)
    assert [name for name in models if unversioned[name] == here[0][name]] == ["alone"]
    assert versioned == here[1]


def test_digest_needs_no_file_of_a_module(helper: Path) -> None:
    models = models_of("helper")
    helper.unlink()
    for model in models.values():
        assert digest(model) == digest(model)


def test_digest_changes_with_the_version(helper: Path) -> None:
    for model in models_of("helper").values():
        assert len({digest(model, version) for version in (None, "1", "2")}) == 3


@pytest.mark.parametrize("way", USING)
def test_model_of_own_modules_without_version_logs_one_warning(
    way: str, helper: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models_of("helper")[way]
    with caplog.at_level(logging.INFO, "inkdask"):
        digest(model)
    (sentence,) = own_messages(caplog)
    assert f"model {registry.resolve(model, version='1').model.key} will not resume" in sentence
    assert all(word in sentence for word in ("helper", "model_version=", "MODEL_VERSION"))


def test_model_whose_code_is_known_logs_nothing(
    helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "installed_network.py").write_text(HELPER.format(factor=1))
    monkeypatch.syspath_prepend(installed)
    for model in models_of("installed_network").values():
        digest(model)
    pool = nn.Sequential(nn.AvgPool3d((2, 4, 4)), nn.Flatten(1, 2)).eval()
    for model in (pool, models_of("helper")["alone"]):
        digest(model)
    digest(models_of("helper")["call"], version="1")
    assert own_messages(caplog) == []
    sys.modules.pop("installed_network")


def test_plan_passes_the_version_on(helper: Path) -> None:
    model = models_of("helper")["function"]
    settings = Settings.of(model=model, model_version="7", tile=8, stride=8)
    plan = Plan.of(np.ones((2, 16, 16), np.uint8), settings)
    assert plan.network.digest == digest(model, "7")
