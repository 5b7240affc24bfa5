"""Where weights come from: the real huggingface_hub and s3fs, against servers on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.models import hub, registry, sources, weights
from inkdask.specs import ModelSpec
from tests.hub_server import FakeRepo, HubServer
from tests.oracle import naive_map, papyrus

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
    return start(SETTLE, *models, **environment)


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process with nothing in its environment that huggingface_hub reads but this."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str]) -> list[dict]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    repos = {
        "ink/open": FakeRepo({"README.md": b"#", "b.ckpt": b"no", "a.safetensors": WEIGHTS}),
        "ink/private": FakeRepo({"a.ckpt": WEIGHTS}, token="hf_right"),
        "ink/gated": FakeRepo({"a.ckpt": WEIGHTS}, gated=True),
        "ink/bare": FakeRepo({"README.md": b"#"}),
        "ink/two": FakeRepo({"epoch1.pt": b"1", "epoch2.pt": b"2", "x/y.pt": WEIGHTS[::-1]}),
    }
    with HubServer(repos) as running:
        yield running


@pytest.fixture(scope="module")
def visit(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Give the answers of a process without a token by model, and the cache that it filled."""
    commit = server.repos["ink/open"].commit
    models = ["ink/open", f"ink/open@{commit}", "ink/open/b.ckpt", "ink/two:x/y.pt@main"]
    models += ["ink/missing", "ink/private", "ink/gated/a.ckpt", "ink/bare", "ink/two"]
    models += ["ink/open@v9", "ink/open/c.pt"]
    home = tmp_path_factory.mktemp("hub")
    found = answers(settle(*models, HF_ENDPOINT=server.url, HF_HOME=str(home)))
    assert server.downloads("a.safetensors") == [None]
    return dict(zip(models, found, strict=True)), home


def test_repo_gives_the_preferred_file_and_its_commit(server: HubServer, visit: tuple) -> None:
    commit = server.repos["ink/open"].commit
    whole, pinned, chosen, nested = list(visit[0].values())[:4]
    assert Path(whole["path"]).read_bytes() == WEIGHTS
    assert (whole["filename"], whole["revision"]) == ("a.safetensors", commit)
    assert pinned == whole
    assert Path(chosen["path"]).read_bytes() == b"no"
    assert (nested["filename"], nested["revision"]) == ("x/y.pt", commit)


def test_repo_fault_is_one_sentence(server: HubServer, visit: tuple) -> None:
    at = f"{server.url}/ink"
    assert [answer["error"] for answer in list(visit[0].values())[4:]] == [
        f"{at}/missing does not exist, or it is private: set HF_TOKEN.",
        f"{at}/private does not exist, or it is private: set HF_TOKEN.",
        f"{at}/gated is open to those who accept its terms on that page: set HF_TOKEN.",
        f"{at}/bare holds no weights: no .safetensors, .ckpt, .pt, .pth, .bin file is there.",
        f"{at}/two holds 3 .pt files, so say which one is meant: epoch1.pt, epoch2.pt, x/y.pt.",
        f"{at}/open has no revision v9.",
        f"{at}/open has no file c.pt at revision main.",
    ]


def test_private_repo_opens_with_its_token_only(server: HubServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    models = ("ink/private", "ink/missing", "ink/private/no.pt")
    right = settle(*models, HF_TOKEN="hf_right", **environment)
    wrong = settle(
        "ink/private", HF_TOKEN="hf_wrong", **environment, HF_HUB_CACHE=str(tmp_path / "2")
    )
    out, err = right.communicate(timeout=120)
    opened, *faults = map(json.loads, out.splitlines())
    assert Path(opened["path"]).read_bytes() == WEIGHTS
    assert all("error" in fault for fault in faults)
    assert "hf_right" not in out + err
    (refused,) = answers(wrong)
    assert refused["error"] == (
        f"{server.url}/ink/private does not exist, or it is private: "
        "the token in HF_TOKEN does not open it."
    )


@pytest.mark.parametrize("fault", ["login page", "other JSON", "no headers"])
def test_answer_that_is_not_the_hubs_is_reported(
    fault: str, server: HubServer, tmp_path: Path
) -> None:
    server.repos["ink/behind"] = FakeRepo({"a.pt": WEIGHTS}, fault=fault)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    for found in answers(settle("ink/behind", "ink/behind/a.pt", **environment)):
        assert found["error"].startswith(f"{server.url}/ink/behind")
        assert (
            f" cannot be read: {server.url} does not answer as the Hugging Face Hub does; check "
            "HF_ENDPOINT, proxies, and whether this network wants a login."
        ) in found["error"]


@pytest.mark.parametrize(("fault", "model"), [("odd names", "ink/odd"), ("ETag .", "ink/odd/a.pt")])
def test_names_that_are_none_are_reported(
    fault: str, model: str, server: HubServer, tmp_path: Path
) -> None:
    server.repos["ink/odd"] = FakeRepo({"a.pt": WEIGHTS}, fault=fault)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    (found,) = answers(settle(model, **environment))
    assert f"{server.url} does not answer as the Hugging Face Hub does" in found["error"]


def test_cache_serves_behind_a_login_page(server: HubServer, tmp_path: Path) -> None:
    repo = server.repos["ink/known"] = FakeRepo({"a.pt": WEIGHTS})
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    (before,) = answers(settle("ink/known", **environment))
    repo.fault = "login page"
    assert answers(settle("ink/known", **environment)) == [before]


@pytest.mark.parametrize("fault", ["bad token", "old token"])
def test_refused_token_is_reported_with_its_place(
    server: HubServer, tmp_path: Path, fault: str
) -> None:
    server.repos["ink/public"] = FakeRepo({"a.pt": WEIGHTS}, fault=fault)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    (tmp_path / "token").write_text("hf_of_login")
    of_file, of_variable = (
        answers(settle("ink/public", **environment, **more))[0]["error"]
        for more in ({}, {"HF_TOKEN": "hf_wrong"})
    )
    refuses = f"{server.url} refuses the token in"
    assert of_file == f"{refuses} {tmp_path / 'token'}: renew or remove it."
    assert of_variable == f"{refuses} HF_TOKEN: renew or remove it."
    (tmp_path / "token").unlink()
    assert "path" in answers(settle("ink/public", **environment))[0]


def test_cut_off_download_is_resumed_or_explained(server: HubServer, tmp_path: Path) -> None:
    large = os.urandom(
        21_500_000
    )  # of which half is sent first; huggingface_hub writes 10 MiB at a time
    server.repos["ink/large"] = FakeRepo({"a.bin": large}, cut={"a.bin": 1})
    server.repos["ink/broken"] = FakeRepo({"b.bin": WEIGHTS}, cut={"b.bin": 1000})
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "IMPATIENT": "1"}
    resumed, given_up = answers(settle("ink/large", "ink/broken", **environment))
    assert Path(resumed["path"]).read_bytes() == large
    assert server.downloads("a.bin") == [None, f"bytes={10 * 2**20}-"]
    file = f"{server.url}/ink/broken/b.bin"
    assert given_up["error"] == f"The download of {file} broke off, and trying again did not help."


def test_processes_side_by_side_download_a_repo_once(server: HubServer, tmp_path: Path) -> None:
    server.repos["ink/shared"] = FakeRepo({"shared.pt": WEIGHTS})
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    processes = [settle("ink/shared", **environment) for _ in range(3)]
    paths = {answer["path"] for process in processes for answer in answers(process)}
    assert len(paths) == 1
    assert server.downloads("shared.pt") == [None]


def test_cache_serves_when_the_hub_is_away(visit: tuple) -> None:
    filled, home = visit
    damaged = Path(filled["ink/two:x/y.pt@main"]["path"])
    damaged.resolve().write_bytes(WEIGHTS)
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "IMPATIENT": "1", "HF_HOME": str(home)}
    offline = settle("ink/open", "ink/none", "ink/two/x/y.pt", HF_HUB_OFFLINE="1", **gone)
    away = settle("ink/open", "ink/none", "ink/none/a.pt", **gone)
    warm, cold, refused = answers(offline)
    assert warm == filled["ink/open"]
    assert cold["error"].endswith(
        "/ink/none is not in the cache, and HF_HUB_OFFLINE forbids to download it."
    )
    assert refused["error"].startswith(f"{damaged} is not the file that the Hub has")
    warm, cold, file = answers(away)
    assert warm == filled["ink/open"]
    lost = "is not in the cache, and the Hub cannot be reached."
    assert cold["error"] == f"http://127.0.0.1:9/ink/none {lost}"
    assert file["error"] == f"http://127.0.0.1:9/ink/none/a.pt {lost}"


DESCRIPTION = b"""
model_type = "depth-cnn"
layers = 5
tile = 32
stride = 16
pixels_per_logit = 4
divisor = 100
"""
PREDICT = """
import sys
import numpy as np
import inkdask
volume = np.load(sys.argv[1])
ink = inkdask.predict(volume, sys.argv[2], precision="float32", compile=False)
np.save(sys.argv[1], ink.map.compute())
"""


@pytest.mark.slow
def test_described_repo_predicts_as_its_description_says(server: HubServer, tmp_path: Path) -> None:
    demo = hub.fetch(registry.KNOWN["demo"])
    files = {"a.safetensors": demo.read_bytes(), "inkdask.toml": DESCRIPTION}
    server.repos["ink/described"] = FakeRepo(files)
    volume = papyrus((5, 40, 48), holes=False)
    np.save(tmp_path / "array.npy", volume)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    answers(start(PREDICT, str(tmp_path / "array.npy"), "ink/described", **environment))
    module = weights.load(registry.resolve("demo"))
    expected = naive_map(volume, module, tile=32, stride=16, divisor=100)
    np.testing.assert_allclose(np.load(tmp_path / "array.npy"), expected, atol=1e-4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fetch(uri: str) -> Path:
    return hub.fetch(ModelSpec(uri, "", uri))


def test_object_and_prefix_are_cached(s3: str) -> None:
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


def test_processes_side_by_side_download_an_object_once(s3: str) -> None:
    storage.write_bytes(f"{s3}/a.safetensors", WEIGHTS)
    processes = [settle(f"{s3}/a.safetensors") for _ in range(3)]
    found = [answer for process in processes for answer in answers(process)]
    assert len({answer["path"] for answer in found}) == 1
    assert Path(found[0]["path"]).read_bytes() == WEIGHTS
    assert sum(answer["bytes"] for answer in found) == len(WEIGHTS)


def test_cut_off_download_of_an_object_is_resumed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_local_folder_gives_the_preferred_file(tmp_path: Path) -> None:
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
def test_parse_splits_an_address(model: str, place: dict | None) -> None:
    assert hub.parse(model) == place


@pytest.mark.parametrize("file", ["../../x", "/x", "./x", "x/", "x/../y"])
def test_parse_reports_what_is_no_file_of_a_repo(file: str) -> None:
    with pytest.raises(InkdaskError, match=r"^a/b/.* names no file of the repo a/b\.$"):
        hub.parse(f"a/b/{file}")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://huggingface.co/ink/big", "ink/big"),
        ("https://huggingface.co/ink/big/", "ink/big"),
        ("https://hf.co/ink/big?library=torch#use", "ink/big"),
        ("http://huggingface.co/ink/big", "ink/big"),
        ("https://www.huggingface.co/ink/big/tree/v2", "ink/big@v2"),
        ("https://huggingface.co/ink/big/a/b.ckpt", "ink/big/a/b.ckpt"),  # as sentences name it
        ("https://huggingface.co/ink/big/tree/v2", "ink/big@v2"),
        ("https://huggingface.co/ink/big/blob/main/a/b.ckpt", "ink/big/a/b.ckpt@main"),
        ("https://huggingface.co/ink/big/resolve/refs%2Fpr%2F1/b.pt?download=true",
         "ink/big/b.pt@refs/pr/1"),
        ("hf://ink/big", "ink/big"),
        ("hf://ink/big@v2/b.pt", "ink/big/b.pt@v2"),
        ("https://elsewhere.org/ink/big", "https://elsewhere.org/ink/big"),
        ("s3://ink/big", "s3://ink/big"),
        ("ink/big@v2", "ink/big@v2"),
    ],
)  # fmt: skip
def test_page_of_the_hub_is_the_address_of_its_repo(url: str, address: str) -> None:
    assert hub.address(url) == address


def test_page_of_a_known_model_has_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = hub.fetch(registry.KNOWN["demo"])
    monkeypatch.setattr(registry.hub, "settle", lambda spec: (spec, demo))
    model = registry.resolve("https://huggingface.co/scrollprize/resnet50_3um_01122024").model
    assert (model.key, model.layers) == ("scrollprize/resnet50_3um_01122024", 18)


@pytest.mark.parametrize(
    "model", ["/no/such.pt", "./no", "~/no", "~no-user/x", "no.ckpt", "no/such.bin"]
)
def test_parse_reports_a_missing_file(model: str) -> None:
    with pytest.raises(InkdaskError, match=r"do not exist\.$"):
        hub.parse(model)


def test_parse_takes_a_file_uri(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    assert hub.parse(f"file://{tmp_path}/a.pt") == {"weights": str(tmp_path / "a.pt")}
