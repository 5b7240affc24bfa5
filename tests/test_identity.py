"""Which job is this: values that JSON holds, digests, differences, and the records of jobs."""

import ast
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import inkdask
from inkdask import identity, records, storage
from inkdask.errors import InkdaskError
from inkdask.identity import FORMAT, Label, Origin, Provenance, Recipe, Said, differences
from tests.jobs import ORIGIN, PROVENANCE, RECIPE, SAID

LABEL = Label(FORMAT, 1, RECIPE, ORIGIN, SAID)
VALUES = [
    RECIPE, ORIGIN, SAID, LABEL, PROVENANCE, replace(PROVENANCE, export=("inkdask", "export")),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_value_survives_json(value):
    text = json.dumps(value.to_json())
    assert type(value).from_json(json.loads(text), "here") == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("how", ["missing", "unknown", "odd"])
def test_damaged_value_is_refused(value, how):
    told = value.to_json()
    name = fields(value)[0].name
    if how == "missing":
        del told[name]
    elif how == "unknown":
        told[name := "flavour"] = "salt"
    else:
        told[name] = {"no": "such"}
    with pytest.raises(InkdaskError, match=rf"^p\.zarr does not say .*{name}"):
        type(value).from_json(told, "p.zarr")


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("tile", 1, 10_000_000),
        ("corner", (0, 0), (10_000_000,) * 2),
        ("layers", (0,), (10_000_000,)),
    ],
)
def test_numbers_of_a_recipe_have_bounds(name, least, most):
    def beyond(value, step):
        return tuple(it + step for it in value) if isinstance(value, tuple) else value + step

    for value in (least, most):
        told = replace(RECIPE, **{name: value}).to_json()
        assert getattr(Recipe.from_json(told, "p.zarr"), name) == value
    for value in (beyond(least, -1), beyond(most, 1)):
        with pytest.raises(InkdaskError, match=name):
            Recipe.from_json(RECIPE.to_json() | {name: value}, "p.zarr")


@pytest.mark.parametrize("told", [None, [], "text", 3, {"recipe": 3}])
def test_something_else_is_refused(told):
    with pytest.raises(InkdaskError, match=r"^p\.zarr does not say"):
        Provenance.from_json(told, "p.zarr")


CHANGES = {
    "input": "other", "mask": "other", "layers": (0, 1, 3), "direction": "reverse", "averaged": 2,
    "corner": (1, 0), "size": (300, 430), "model": "x", "architecture": "x", "weights": "cd" * 32,
    "clip": 100.0, "divisor": 255.0, "precision": "float32", "tta": "mirror", "tile": 32,
    "stride": 32, "k": 8, "chunk": (256, 128),
}  # fmt: skip


def test_digest_depends_on_every_field_of_a_recipe():
    assert set(CHANGES) == {field.name for field in fields(Recipe)}
    others = [replace(RECIPE, **{name: value}) for name, value in CHANGES.items()]
    assert len({RECIPE.digest, *(other.digest for other in others)}) == len(CHANGES) + 1
    for name, other in zip(CHANGES, others, strict=True):
        assert differences(RECIPE, other).startswith(f"{name} is ")
    assert replace(RECIPE).digest == RECIPE.digest


def test_differences_are_said_in_words():
    assert differences(RECIPE, RECIPE) == ""
    assert differences(RECIPE, replace(RECIPE, stride=32)) == "stride is 16 there and 32 here"
    assert differences(SAID, {"stride": 16}) == ""
    assert differences(SAID, {"layers": (0, 3), "mask_path": "m.png"}) == (
        "mask_path is not set there and m.png here"
    )
    for model, said in ((f"{'a' * 20}{'z' * 20}",) * 2, (f"{'a' * 18}---{'z' * 20}", None)):
        short = said or f"{'a' * 18}...{'z' * 18}"
        assert differences(RECIPE, replace(RECIPE, model=model)).endswith(f"and {short} here")


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_frozen(value):
    """Because names of grids follow from them."""
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


def test_name_of_a_grid_lasts():
    """Another digest of the same recipe, or another format, lets no job resume from its grid."""
    assert FORMAT == 5
    assert identity.digest({"a": 1, "b": [2.0, None]}) == identity.digest(
        {"b": [2.0, None], "a": 1}
    )
    assert RECIPE.digest[:16] == "6c916df09c358f55"


FIRST = "run it first."


def test_record_is_found_by_what_was_said(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(InkdaskError, match=r"No job in .* it has none; run it first\."):
        records.find(folder, {"stride": 16}, FIRST)
    records.keep(folder, SAID, "grid-a")
    assert records.find(folder, {"s3_path": "s3://bucket/seg", "stride": 16}, FIRST) == "grid-a"
    with pytest.raises(InkdaskError, match="in grid-a, stride is 16 there and 32 here; run it"):
        records.find(folder, {"stride": 32}, FIRST)


def test_record_of_the_same_words_is_replaced(home):
    records.keep(home, SAID, "grid-a")
    records.keep(home, replace(SAID, layers=(0, 3)), "grid-b")
    assert records.find(home, {"stride": 16}, FIRST) == "grid-b"
    assert len(storage.list_folder(storage.join(home, "jobs"))) == 1


def test_several_records_are_named_with_what_differs(tmp_path):
    folder = str(tmp_path)
    for number, stride in enumerate((16, 32, 48, 64)):
        records.keep(folder, replace(SAID, stride=stride), f"grid-{number}")
    says = r"^4 jobs in .* are meant, the first in grid-\d; in grid-\d, stride is \d+ in the first"
    with pytest.raises(InkdaskError, match=says) as caught:
        records.find(folder, {"tile": 64}, FIRST)
    assert str(caught.value).count("grid-") == 3
    assert records.find(folder, {"stride": 48}, FIRST) == "grid-2"
    with pytest.raises(InkdaskError, match="; and 1 that differ more; run it first"):
        records.find(folder, {"stride": 8}, FIRST)


def test_region_is_found_as_itself_or_in_the_whole(tmp_path):
    folder, roi = str(tmp_path), (0, 0, 100, 90)
    records.keep(folder, SAID, "whole")
    assert records.find(folder, {"roi_xyxy": roi}, FIRST) == "whole"
    records.keep(folder, replace(SAID, roi_xyxy=roi), "region")
    assert records.find(folder, {"roi_xyxy": roi}, FIRST) == "region"
    assert records.find(folder, {"roi_xyxy": None}, FIRST) == "whole"


NESTED = b"[" * 200_000 + b"]" * 200_000  # deeper than the parser follows


@pytest.mark.parametrize(
    "text", [b"", b"no json", b"[]", b"{}", b'{"said": {}, "grid": "x"}', NESTED], ids=range(6)
)
def test_damaged_record_blocks_no_other(tmp_path, text, caplog):
    folder = str(tmp_path)
    records.keep(folder, SAID, "grid-a")
    storage.write_bytes(f"{folder}/jobs/damaged.json", text)
    assert records.find(folder, {"stride": 16}, FIRST) == "grid-a"
    assert "damaged.json is passed over" in caplog.text


def test_only_identity_reads_fields_by_their_text():
    """A recipe, an origin and what was said are values, whose fields have types."""
    names = {f.name for kind in (Recipe, Origin, Said, Provenance) for f in fields(kind)}
    # Words of arrays, of zarr, of settings, of a sweep.
    names -= {"size", "chunk", "input", "chunk_size", "segment"}
    names |= {"fingerprint", "recipe", "origin"}
    house = Path(inkdask.__file__).parent
    found = [
        f"{file.relative_to(house)}:{node.lineno} {text!r}"
        for file in house.rglob("*.py")
        if file != Path(identity.__file__)
        # A model's spec, the settings and a prepared array have fields of the same names, and
        # controls are jobs with changed settings.
        and file.parent.name not in ("models", "reading", "controls")
        and file.name != "settings.py"
        for node in ast.walk(ast.parse(file.read_text()))
        for text in subscripts(node)
        if text in names
    ]
    assert found == []


def subscripts(node):
    """Texts that an expression looks up: ``x["text"]``, ``x.get("text")``; not where it stores."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        keys = [node.slice]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        keys = node.args[:1] if node.func.attr in ("get", "pop") else []
    else:
        keys = []
    return [key.value for key in keys if isinstance(key, ast.Constant)]
