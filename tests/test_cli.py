"""The command line."""

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import dask.array as da
import dask.cli
import numpy as np
import pytest
import tifffile
from PIL import Image

import inkdask
from inkdask import cli, messages, store
from inkdask.memory import expected_memory
from inkdask.models.registry import known
from inkdask.tiling import Tiling
from tests.oracle import papyrus

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def segment(tmp_path):
    folder = tmp_path / "20231210"
    (folder / "layers").mkdir(parents=True)
    for number, layer in enumerate(papyrus((3, 400, 300))):
        tifffile.imwrite(
            folder / "layers" / f"{number:02d}.tif",
            layer.astype(np.uint16) << 8,
            rowsperstrip=64,
            compression="zlib",
        )
    return folder


def said(capsys, *arguments):
    cli.main(arguments)
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_version_is_the_same_everywhere(capsys):
    """The version is written in pyproject.toml and in ``__init__.py``."""
    cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["inkdask,", "version", version("inkdask")]
    assert inkdask.__version__ == version("inkdask")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "seg"], "what is done is kept, and the same command resumes"),
        (["run", "seg", "--overwrite"], "interrupted before it began: give the same command again"),
        (["export", "p.zarr", "--to", "p.png"], "inkdask: interrupted.\n"),
    ],
)
def test_interrupted_command_says_what_it_keeps(capsys, monkeypatch, words, says):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(store, "restarted", [])
    monkeypatch.setattr(cli.inkdask_, "main", interrupted)
    monkeypatch.setattr(cli.os, "_exit", leave)
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 130
    assert says in capsys.readouterr().err


def test_info_describes_segment(segment, capsys):
    rows = said(capsys, "info", str(segment))
    assert rows["segment"] == str(segment)
    assert rows["layers"] == "3 (0:3)"
    assert rows["size"] == "300 x 400 pixels (x, y)"
    assert "uint16" in rows["type"]
    assert "64-row strips" in rows["layout"]
    assert rows["tiles"].startswith("352 of 64 px at stride 16")
    assert "chunks" in rows
    assert "MB" in rows["memory"]


def test_info_tells_what_a_model_costs(segment, capsys):
    rows = said(capsys, "info", str(segment), "--model", "hecate-9.6um")
    assert rows["tiles"].startswith("108 of 64 px at stride 32")
    assert rows["grid"].startswith("about 4")  # as many probabilities as 108 tiles have pixels
    assert said(capsys, "info", str(segment))["grid"].endswith("kB")


def test_info_of_masked_segment_says_that_fewer_tiles_run(segment, capsys):
    assert "mask" not in said(capsys, "info", str(segment))["tiles"]
    Image.new("L", (300, 400), 255).save(segment / f"{segment.name}_mask.png")
    rows = said(capsys, "info", str(segment))
    assert rows["mask"].endswith("_mask.png")
    assert rows["tiles"].endswith("fewer by what the mask leaves out")


def test_log_shows_own_messages_and_warnings_once():
    def shown(name, level, error=None):
        return messages.is_for_everybody(logging.LogRecord(name, level, "", 0, "", None, error))

    assert shown("inkdask.store", logging.INFO)
    assert shown("distributed.worker", logging.WARNING)
    assert not shown("distributed.worker", logging.INFO)
    assert not shown("distributed.client", logging.ERROR, (OSError, OSError(), None))
    assert shown("inkdask.background", logging.ERROR, (OSError, OSError(), None))
    assert not shown("huggingface_hub.file_download", logging.WARNING)


def test_info_counts_tiles_of_given_layers_and_stride(segment, capsys):
    rows = said(capsys, "info", str(segment), "--layers", "1:3", "--tile", "32", "--stride", "32")
    assert rows["layers"] == "2 (1:3)"
    assert rows["tiles"].startswith("130 of 32 px at stride 32")


def test_info_reports_missing_path(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", str(tmp_path / "nothing")])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "nothing" in error
    assert len(error.splitlines()) == 1


def test_expected_memory_does_not_grow_with_the_height():
    estimates = [
        expected_memory(
            da.zeros((26, 512 * count, 4000), dtype="uint8", chunks=(26, 512, 4000)),
            Tiling.of((512 * count, 4000), 64, 16, 1024),
        )
        for count in (8, 40)
    ]
    assert estimates[0] == estimates[1]
    assert estimates[0] < 1.5e9


def test_models_lists_every_key(capsys):
    cli.main(["models"])
    text = capsys.readouterr().out
    for key in known():
        assert key in text
    assert "scrollprize/hecate:hecate_2.4um.pth at 9cb86e500e94" in text
    assert "suits segments of 64 layers and more, of scans of 2.4 um\n" in text
    assert "tile 256, stride 128; voxels divided by 200" in text
    cli.main(["models", "--json"])
    listed = {spec["key"]: spec for spec in json.loads(capsys.readouterr().out)}
    assert listed.keys() == known().keys()
    assert (listed["ink-9um"]["clip"], listed["ink-9um"]["pixel_um"]) == (None, 9.6)


def test_dask_ink_runs_the_same_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dask", "ink", "models"])
    with pytest.raises(SystemExit) as ended:
        dask.cli.run_cli()
    assert not ended.value.code
    assert "timesformer-scroll5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "--stride", "x"], 2, "--stride (STRIDE): "),
        (["run", "--no-such-option"], 2, "no-such-option"),
        (["walk"], 2, "walk"),
        (["run", "/nowhere", "--model", "demo"], 1, "/nowhere"),
    ],
)
def test_cli_reports_mistakes_with_an_exit_code(arguments, code, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == code
    assert says in capsys.readouterr().err


def test_reduce_takes_the_grid_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STEP", "reduce")
    monkeypatch.setenv("GRID", str(tmp_path / "grid.zarr"))
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert "grid.zarr is no tile grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        (
            ["run", "seg", "--layers", "0:20"],
            {},
            "Name 26 with --layers (START_LAYER and END_LAYER), or set --model-in-chans "
            "(MODEL_IN_CHANS).",
        ),
        (["run"], {}, "Name 26 with START_LAYER and END_LAYER, or set MODEL_IN_CHANS."),
        (
            ["run", "seg", "--model", "demo"],
            {"START_LAYER": "0", "END_LAYER": "20"},
            "Name 26 with START_LAYER and END_LAYER, or set --model-in-chans (MODEL_IN_CHANS).",
        ),
    ],
)
def test_messages_name_what_was_typed(monkeypatch, words, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = "Name 26 with START_LAYER and END_LAYER, or set MODEL_IN_CHANS."
    assert cli.as_typed(told, words) == says
    if "--model" in words:
        assert cli.as_typed("give NUM_PARTS=4", words) == "give --num-parts 4"


@pytest.mark.parametrize("stream", ["full", "closed", "none"])
def test_job_ends_well_without_standard_error(segment, tmp_path, monkeypatch, capsys, stream):
    """A console may be gone, and a disk that takes the messages may be full."""
    result, error = tmp_path / "result", Path("/dev/full").open("w")  # noqa: SIM115
    if stream == "closed":
        error = Path("/dev/null").open("w")  # noqa: SIM115
        error.close()
    monkeypatch.setattr(sys, "stderr", None if stream == "none" else error)
    words = ["--model", "demo", "--model-in-chans", "3", "--result-file", str(result)]
    cli.main(["run", str(segment), *words])
    assert capsys.readouterr().out == f"{result.read_text()}\n"


def test_full_standard_output_is_said_after_the_job(segment, tmp_path, monkeypatch, capsys):
    result = tmp_path / "result"
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    words = ["--model", "demo", "--model-in-chans", "3", "--result-file", str(result)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(segment), *words])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith(
        "inkdask: Standard output cannot be written: No space left on device.\n"
    )
    assert result.exists()
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    with pytest.raises(SystemExit):
        cli.main(["models"])
    assert capsys.readouterr().err.startswith("inkdask: Standard output cannot be written")
