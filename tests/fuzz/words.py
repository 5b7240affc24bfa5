"""Settings: values in the environment and in Python, and words of the command line."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import click

from inkdask import cli
from inkdask.settings import Settings, parameters
from tests.files import random_volume, write_layers
from tests.fuzz import spoil
from tests.fuzz.campaign import environment

VALUES = (
    "", " ", "0", "1", "-1", "2", "3", "16", "64", "1e3", "1e30", "1e999", "nan", "inf", "-inf",
    "0.5", "007", "+5", "1_000", "0x10", "١", "²", "true", "false", "TRUE", "yes", "none", "None",
    "auto", "0:4", "4:0", "0:", ":", "0:1:2", "-3:2", "0:999999999", "1,2,3,4", "0,0,16,16",
    "0,0,1e9,1e9", "0,0,99999999999999999999,16", "a,b,c,d", "tcp://", "tcp://h:1", "threads",
    "local", "hann", "gaussian", "int8", "float32", "timesformer", "depth-cnn", "demo", "a/b",
    "a/b/../../x", "a/b@c", "package://os/x", "package://inkdask.models/demo.safetensors",
    "https://huggingface.co/a/b", "hf://a", "s3://", "s3a:/x", "ftp://x/y", "[x]*", "é\u0301",
    "\udcff", "x" * 300, "\x1b[2J", "a\nb", "9" * 400, "1" * 5000, "./sub", "../input", "missing",
    "~nobody/x", "%d", "{}", "--", "-x",
)  # fmt: skip
# Only for commands that connect to nothing and write below the folder of the input.
COMMANDS = ("info", "info", "check", "check", "models", "export", "prepare", "--version", "nothing")
NETWORK = ("model", "hf_token")


@contextlib.contextmanager
def opened(home):
    """Yield the reader of one input."""
    write_layers(home / "segment" / "layers", random_volume((4, 70, 80)))
    clean = {variable: None for _, variable, _ in parameters()}
    here = Path.cwd()
    with environment(**clean, HF_HUB_OFFLINE="1", HF_HOME=str(home / "hub")):
        with contextlib.redirect_stdout(io.StringIO()):  # imports take their time
            cli.main(["check", str(home / "segment"), "--model", "demo", "--model-in-chans", "4"])
        yield lambda rng, folder: read(rng, folder, home / "segment")
    os.chdir(here)


def read(rng, folder, segment):
    """Give odd values to some parameters, by one of three ways."""
    os.chdir(folder)
    (folder / "sub").mkdir()
    given = {
        name: value_of(rng, field, folder)
        for name, _, field in parameters()
        if rng.integers(30) == 0
    }
    kept = {variable: given.pop(name) for name, variable, _ in parameters()
            if name in given and rng.integers(2)}  # fmt: skip
    kept = {name: text for name, text in kept.items() if "\0" not in text}
    (folder / "input.json").write_text(json.dumps([kept, given]))
    kept = {name: text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
            for name, text in kept.items()}  # fmt: skip
    with environment(**kept):
        if rng.integers(3):
            return in_python(rng, given, kept)
        return on_command_line(rng, given, segment, folder)


def value_of(rng, field, folder):
    """Return a text that may be a value of a parameter."""
    if get_origin(field.annotation) is Literal and rng.integers(2):
        return str(spoil.choice(rng, get_args(field.annotation)))
    if rng.integers(10) == 0:
        return str(folder / "sub")
    if rng.integers(3) == 0:
        return str(spoil.number(rng))
    return spoil.choice(rng, VALUES)


def in_python(rng, given, kept):
    """Make settings, and compare them with what was said."""
    if rng.integers(4) == 0 and given:
        given[spoil.choice(rng, list(given))] = spoil.odd_value(rng)
    settings = Settings.of(**given)
    for name, variable, field in parameters():
        value, said = getattr(settings, name), given.get(name, kept.get(variable))
        if field.annotation is int and isinstance(said, str) and said.strip():
            assert value == int(said), (name, value, said)
        if field.annotation is float and isinstance(said, str) and said.strip():
            assert value == float(said), (name, value, said)
    again = Settings.of(**{name: getattr(settings, name) for name in settings.model_fields_set})
    assert again == settings
    assert (settings.start_layer is None) == (settings.end_layer is None)
    return "read"


def on_command_line(rng, given, segment, folder):
    """Run a command, which prints its result, or one sentence and ends with status 1 or 2."""
    command = spoil.choice(rng, COMMANDS)
    known = click_options(command)
    words = [command, *[str(segment)] * (command in ("info", "check", "prepare"))]
    if command == "export":
        words += ["sub", "--to", spoil.choice(rng, ("a.png", "b.tif", "c.gif", "", "sub"))]
    if command == "check" and rng.integers(4):
        words += ["--model", "demo", "--model-in-chans", "4"]
    for name, text in given.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in known:
            words += [flag] if known[flag] else [flag, text]
    if rng.integers(6) == 0:
        words.insert(int(rng.integers(len(words) + 1)), spoil.choice(rng, VALUES))
    out, err = io.StringIO(), io.StringIO()
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except SystemExit as end:
        status = end.code
    if not status:
        return "read"
    assert status in (1, 2), status
    lines = err.getvalue().strip().splitlines()
    assert any(line.startswith(("Error: ", "inkdask: ")) for line in lines), lines
    return "refused"


def click_options(command):
    """Return the options of a command, and whether each is a flag."""
    found = cli.inkdask_.commands.get(command)
    options = [it for it in found.params if isinstance(it, click.Option)] if found else []
    return {flag: it.is_flag for it in options for flag in it.opts}
