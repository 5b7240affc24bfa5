"""What `info`, `check` and `models` tell before a job: layers, models that fit, and times."""

import logging
import re

import pytest

import inkdask
from inkdask import cli, environment, paces, storage
from inkdask.errors import SettingsError
from inkdask.information import describe
from inkdask.models import registry
from tests.files import random_volume, write_layers
from tests.jobs import network

pytestmark = pytest.mark.usefixtures("own_environment")


def said(capsys, *arguments):
    cli.main(arguments)
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.fixture
def segment(tmp_path):
    write_layers(tmp_path / "segment" / "layers", random_volume((3, 130, 100)))
    return tmp_path / "segment"


def test_info_shows_the_rest_of_a_segment_that_lacks_layers(tmp_path, capsys):
    write_layers(tmp_path / "layers", random_volume((6, 130, 100)))
    (tmp_path / "layers" / "03.tif").unlink()
    rows = said(capsys, "info", str(tmp_path))
    assert rows["layers"] == "5 (0:6)"
    assert rows["missing"] == "layers 03, without which no job reads this range"
    assert rows["size"] == "100 x 130 pixels (x, y)"
    rows = said(capsys, "info", str(tmp_path), "--layers", "4:8")
    assert rows["layers"] == "2 (4:6)"
    assert rows["missing"].startswith("layers 06, 07,")
    assert "missing" not in said(capsys, "info", str(tmp_path), "--layers", "0:3")


def test_info_and_check_tell_the_time_that_a_job_took_here(tmp_path, capsys, caplog, monkeypatch):
    volume = random_volume((26, 130, 200))
    write_layers(tmp_path / "segment" / "layers", volume)
    segment = str(tmp_path / "segment")
    rows = said(capsys, "info", segment, "--model", "demo")
    assert rows["time"] == "not timed on this machine yet"
    models = describe(segment)["models"]
    assert [row.split()[0] for row in models][-1] == "demo"
    assert all(row.endswith("not timed on this machine yet") for row in models)
    assert not [row for row in models if row.startswith("hecate-2.4um")]  # 64 layers
    monkeypatch.setattr(paces, "SHORTEST", 0.0)
    inkdask.run(segment, model="demo", roi_xyxy="0,0,64,64")
    inkdask.check(segment, model="demo")
    assert re.search("ready: 60 tiles at most to run; .* tiles/s here", caplog.text)
    assert " tiles/s here)" in said(capsys, "info", segment, "--model", "demo")["time"]
    assert "tiles/s here)" in describe(segment)["models"][-1]
    assert "not timed" in describe(segment)["models"][0]
    inkdask.run(segment, model="demo")
    inkdask.check(segment, model="demo")
    assert "ready: all tiles are there, and only the picture is made" in caplog.text
    inkdask.check(segment, model="demo", overwrite=True)
    assert caplog.text.count("ready: 60 tiles at most to run") == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "\x00"])
def test_damaged_paces_are_no_paces(text):
    file = environment.cache_home() / "paces.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    network = registry.resolve("demo")
    assert paces.kept(network) is None
    paces.keep(network, 10, 20.0)
    assert paces.kept(network) == 2.0
    file.write_text(file.read_text().replace("2.0", "NaN"))
    assert paces.kept(network) is None


def test_pace_that_cannot_be_kept_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    network = registry.resolve("demo")
    paces.keep(network, 10, 20.0)
    assert paces.kept(network) is None


def test_info_lists_the_segments_of_a_folder(home, capsys):
    for name in ("a", "b"):
        write_layers(storage.join(home, name, "layers"), random_volume((3, 70, 80)))
    storage.write_bytes(storage.join(home, "c", "notes.txt"), b"")
    storage.write_bytes(storage.join(home, "d", "layers", "02.tif"), b"")
    storage.write_bytes(storage.join(home, "d", "layers", "00.tif"), b"")
    rows = said(capsys, "info", home)
    assert rows == {
        "folder": home, "segments": "3", "a": "3 layers (0:3)", "b": "3 layers (0:3)",
        "d": "2 layers (0:3 without 01)",
    }  # fmt: skip


def test_info_of_a_folder_leaves_out_pictures(own_tiles, tmp_path, capsys):
    write_layers(tmp_path / "a" / "layers", random_volume((3, 70, 80)))
    inkdask.run(tmp_path / "a", model=network, output_path=tmp_path)
    assert "a" in said(capsys, "info", str(tmp_path))
    assert said(capsys, "info", str(tmp_path))["segments"] == "1"


@pytest.mark.parametrize(
    "words", [["-v", "info", "{}"], ["info", "-v", "{}"], ["info", "{}", "-v"]]
)
def test_more_messages_are_shown_wherever_the_option_stands(segment, words, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a process of its own
    cli.main(["info", str(segment)])
    assert "are read, in this order" not in capsys.readouterr().err
    cli.main([word.format(segment) for word in words])
    assert "are read, in this order" in capsys.readouterr().err


def test_help_shows_whole_summaries(capsys):
    cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.partition("Commands:")[2].split())
    assert "..." not in out
    for command in cli.inkdask_.commands.values():
        assert " ".join(command.help.split("\n\n")[0].split()) in out


def test_models_say_what_they_suit(capsys):
    cli.main(["models"])
    shown = capsys.readouterr().out
    assert shown.count("    suits segments of ") == len(registry.known())
    assert "suits segments of 26 layers and more; trained on synthetic ink" in shown


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("words", [["info"], ["evidence"], ["export", "--to", "a.png"]])
def test_empty_path_is_refused(segment, monkeypatch, capsys, words, blank):
    monkeypatch.chdir(segment)
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, blank])
    assert caught.value.code == 2
    assert re.fullmatch(r"inkdask: The path is empty: name [^\n]*\.\n", capsys.readouterr().err)
    with pytest.raises(SettingsError, match="The path is empty"):
        inkdask.predict(blank, model="demo")
