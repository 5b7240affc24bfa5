"""Where weights come from: the real huggingface_hub and s3fs, against servers on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.models import hub, registry, sources
from inkdask.specs import ModelSpec
from tests.hub_server import FakeRepo, HubServer

WEIGHTS = os.urandom(300_000)

# huggingface_hub reads its environment once, on import: every test of it is a process of its own.
SETTLE = """
import json, os, sys, time
if "IMPATIENT" in os.environ:
    time.sleep = lambda seconds: None
from inkdask import storage
from inkdask.models import hub
from inkdask.errors import InkdaskError
from inkdask.specs import ModelSpec
for model in sys.argv[1:]:
    try:
        spec, path = hub.settle(ModelSpec(model, "", **hub.parse(model)))
        answer = {"path": str(path), "weights": spec.weights, "filename": spec.filename,
                  "revision": spec.revision}
    except InkdaskError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"bytes": storage.counters().bytes_read}))
"""


def settle(*models: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that asks for models one after the other."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", SETTLE, *models],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str]) -> list[dict]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def server() -> Iterator[HubServer]:
    repos = {
        "ink/open": FakeRepo({"README.md": b"#", "b.ckpt": b"no", "a.safetensors": WEIGHTS}),
        "ink/private": FakeRepo({"a.ckpt": WEIGHTS}, token="hf_right"),
        "ink/gated": FakeRepo({"a.ckpt": WEIGHTS}, gated=True),
        "ink/bare": FakeRepo({"README.md": b"#"}),
        "ink/two": FakeRepo({"epoch1.pt": b"1", "epoch2.pt": b"2", "x/y.pt": b"3"}),
    }
    with HubServer(repos) as running:
        yield running


def test_repo_gives_the_preferred_file_and_its_commit(server: HubServer, tmp_path: Path) -> None:
    commit = server.repos["ink/open"].commit
    whole, pinned, chosen, nested = answers(
        settle(
            "ink/open",
            f"ink/open@{commit}",
            "ink/open/b.ckpt",
            "ink/two/x/y.pt@main",
            HF_ENDPOINT=server.url,
            HF_HOME=str(tmp_path),
        )
    )
    assert Path(whole["path"]).read_bytes() == WEIGHTS
    assert (whole["filename"], whole["revision"]) == ("a.safetensors", commit)
    assert pinned == whole
    assert Path(chosen["path"]).read_bytes() == b"no"
    assert (nested["filename"], nested["revision"]) == ("x/y.pt", commit)
    assert server.downloads("a.safetensors") == [None]


def test_each_fault_of_a_repo_is_one_sentence(server: HubServer, tmp_path: Path) -> None:
    names = ["ink/missing", "ink/private", "ink/gated/a.ckpt", "ink/bare", "ink/two"]
    names += ["ink/open@v9", "ink/open/c.pt"]
    found = answers(settle(*names, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path)))
    at = f"{server.url}/ink"
    assert [answer["error"] for answer in found] == [
        f"{at}/missing does not exist, or it is private: set HF_TOKEN.",
        f"{at}/private does not exist, or it is private: set HF_TOKEN.",
        f"{at}/gated is open to those who accept its terms on that page: set HF_TOKEN.",
        f"{at}/bare holds no weights: no .safetensors, .ckpt, .pt, .bin file is there.",
        f"{at}/two holds 3 .pt files, so say which one is meant: epoch1.pt, epoch2.pt, x/y.pt.",
        f"{at}/open has no revision v9.",
        f"{at}/open has no file c.pt at revision main.",
    ]


def test_private_repo_opens_with_its_token_only(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    right = settle("ink/private", HF_TOKEN="hf_right", **environment)
    wrong = settle(
        "ink/private", HF_TOKEN="hf_wrong", **environment, HF_HUB_CACHE=str(tmp_path / "2")
    )
    (opened,), (refused,) = answers(right), answers(wrong)
    assert Path(opened["path"]).read_bytes() == WEIGHTS
    assert refused["error"] == (
        f"{server.url}/ink/private does not exist, or it is private: "
        "the token in HF_TOKEN does not open it."
    )


def test_download_cut_off_halfway_is_resumed(server: HubServer, tmp_path: Path) -> None:
    large = os.urandom(24_000_000)  # huggingface_hub writes 10 MiB at a time
    server.repos["ink/large"] = FakeRepo({"a.bin": large}, cut={"a.bin": 1})
    (found,) = answers(settle("ink/large", HF_ENDPOINT=server.url, HF_HOME=str(tmp_path)))
    assert Path(found["path"]).read_bytes() == large
    assert server.downloads("a.bin") == [None, f"bytes={10 * 2**20}-"]


def test_download_that_never_arrives_whole_is_one_sentence(
    server: HubServer, tmp_path: Path
) -> None:
    server.repos["ink/open"].cut["a.safetensors"] = 1000
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "IMPATIENT": "1"}
    (found,) = answers(settle("ink/open", **environment))
    file = f"{server.url}/ink/open/a.safetensors"
    assert found["error"] == (f"The download of {file} broke off, and trying again did not help.")


def test_eight_processes_download_a_repo_once(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    processes = [settle("ink/open", **environment) for _ in range(8)]
    paths = {answer["path"] for process in processes for answer in answers(process)}
    assert len(paths) == 1
    assert server.downloads("a.safetensors") == [None]


def test_cache_serves_when_the_hub_is_away(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path)}
    (filled,) = answers(settle("ink/open", HF_ENDPOINT=server.url, **environment))
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "IMPATIENT": "1", **environment}
    warm, cold = answers(settle("ink/open", "ink/bare", HF_HUB_OFFLINE="1", **gone))
    assert warm == filled
    assert cold["error"].endswith(
        "/ink/bare is not in the cache, and HF_HUB_OFFLINE forbids to download it."
    )
    warm, cold, file = answers(settle("ink/open", "ink/bare", "ink/bare/a.pt", **gone))
    assert warm == filled
    away = "is not in the cache, and the Hub cannot be reached."
    assert cold["error"] == f"http://127.0.0.1:9/ink/bare {away}"
    assert file["error"] == f"http://127.0.0.1:9/ink/bare/a.pt {away}"


def test_damaged_file_in_the_cache_is_noticed(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    (found,) = answers(settle("ink/open", **environment))
    blob = Path(found["path"]).resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"?")
    (refused,) = answers(settle("ink/open", **environment))
    assert refused["error"].startswith(f"{found['path']} is not the file that the Hub has")


def test_token_shows_in_no_message_and_no_spec(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_right"}
    found = settle("ink/private", "ink/missing", "ink/private/no.pt", **environment)
    out, err = found.communicate(timeout=120)
    assert len(out.splitlines()) == 3
    assert "hf_right" not in out + err


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fetch(uri: str) -> Path:
    return hub.fetch(ModelSpec(uri, "", uri))


def test_object_and_prefix_come_into_the_cache(s3: str) -> None:
    for key in ("m/a.pt", "m/b.ckpt", "m/notes.txt", "m/deeper/c.safetensors", "empty/x.txt"):
        storage.write_bytes(f"{s3}/{key}", key.encode())
    assert fetch(f"{s3}/m/a.pt").read_bytes() == b"m/a.pt"
    spec, path = hub.settle(ModelSpec("m", "", f"{s3}/m/"))
    assert path.read_bytes() == b"m/b.ckpt"
    assert spec.weights == f"{s3}/m/b.ckpt"
    with pytest.raises(InkdaskError, match=rf"^{s3}/empty holds no weights"):
        fetch(f"{s3}/empty/")
    with pytest.raises(InkdaskError, match=rf"^{s3}/m/none\.pt does not exist\.$"):
        fetch(f"{s3}/m/none.pt")
    with pytest.raises(InkdaskError, match=r"^The bucket of s3://away.* does not exist\.$"):
        fetch("s3://away/m/")


def test_object_is_downloaded_once_until_it_changes(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.pt", b"first")
    before = storage.counters().bytes_read
    assert fetch(f"{s3}/a.pt") == fetch(f"{s3}/a.pt")
    assert storage.counters().bytes_read - before == len(b"first")
    storage.write_bytes(f"{s3}/a.pt", b"other")
    assert fetch(f"{s3}/a.pt").read_bytes() == b"other"


def test_eight_processes_download_an_object_once(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.safetensors", WEIGHTS)
    processes = [settle(f"{s3}/a.safetensors") for _ in range(8)]
    found = [answer for process in processes for answer in answers(process)]
    assert len({answer["path"] for answer in found}) == 1
    assert Path(found[0]["path"]).read_bytes() == WEIGHTS
    assert sum(answer["bytes"] for answer in found) == len(WEIGHTS)


def test_download_of_an_object_is_taken_up_where_it_was_left(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3}/a.bin", WEIGHTS)
    monkeypatch.setattr(sources, "_BLOCK", 10_000)
    read_range, asked = storage.read_range, []

    def break_off(uri: str, start: int, stop: int) -> bytes:
        if start >= 200_000:
            raise InkdaskError(f"{uri} does not answer.")
        return read_range(uri, start, stop)

    monkeypatch.setattr(storage, "read_range", break_off)
    with pytest.raises(InkdaskError, match="does not answer"):
        fetch(f"{s3}/a.bin")

    def listen(uri: str, start: int, stop: int) -> bytes:
        asked.append(start)
        return read_range(uri, start, stop)

    monkeypatch.setattr(storage, "read_range", listen)
    assert fetch(f"{s3}/a.bin").read_bytes() == WEIGHTS
    assert sorted(asked) == list(range(200_000, 300_000, 10_000))


def test_damaged_download_of_an_object_is_not_kept(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.bin", WEIGHTS)
    path = fetch(f"{s3}/a.bin")
    path.unlink()
    path.with_name("a.bin.part").write_bytes(b"?" * 1000)  # as a crash may leave it
    with pytest.raises(InkdaskError, match="did not arrive as it is there"):
        fetch(f"{s3}/a.bin")
    assert fetch(f"{s3}/a.bin").read_bytes() == WEIGHTS


def test_description_beside_an_object_is_read(s3: str) -> None:
    storage.write_bytes(f"{s3}/m/a.pt", WEIGHTS)
    storage.write_bytes(f"{s3}/m/a.toml", b"layers = 30")
    for model in (f"{s3}/m/a.pt", f"{s3}/m"):
        network = registry.resolve(model)
        assert network.layers == 30
        assert network.digest == hashlib.sha256(WEIGHTS).hexdigest()


def test_local_weights_are_found_by_preference(tmp_path: Path) -> None:
    for name in ("a.bin", "b.pt", "c.ckpt", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert fetch(str(tmp_path)).name == "c.ckpt"
    (tmp_path / "e.safetensors").write_bytes(b"x")
    assert fetch(str(tmp_path)).name == "e.safetensors"
    assert fetch(str(tmp_path / "a.bin")).name == "a.bin"
    with pytest.raises(InkdaskError, match=r"a\.pt do not exist\.$"):
        fetch(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("ink/big", {"weights": "ink/big"}),
        ("ink/big@v2", {"weights": "ink/big", "revision": "v2"}),
        ("ink/big/a/b.ckpt", {"weights": "ink/big", "filename": "a/b.ckpt"}),
        ("ink/big/b.pt@v2", {"weights": "ink/big", "filename": "b.pt", "revision": "v2"}),
        ("s3://ink/m/", {"weights": "s3://ink/m/"}),
        ("timesformer", None),
        ("", None),
    ],
)
def test_addresses(model: str, place: dict | None) -> None:
    assert hub.parse(model) == place


@pytest.mark.parametrize("model", ["/no/such.pt", "./no", "~/no", "no.ckpt", "no/such.bin"])
def test_addresses_that_can_only_be_files(model: str) -> None:
    with pytest.raises(InkdaskError, match=r"do not exist\.$"):
        hub.parse(model)


def test_uri_of_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    assert hub.parse(f"file://{tmp_path}/a.pt") == {"weights": str(tmp_path / "a.pt")}
