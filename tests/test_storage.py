"""Local paths and S3 behind the same calls: listings, reads, writes, and failures."""

import multiprocessing
import os
import pickle
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from inkdask import storage
from inkdask.errors import InkdaskError, SettingsError, UnavailableError
from inkdask.segment import open_segment
from inkdask.storage import outputs
from inkdask.storage import s3 as s3_module
from inkdask.storage.dask_arrays import StoredArray


def test_join_gives_single_slashes():
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("/data", "b") == "/data/b"
    assert storage.join("/", "b") == "/b"


def test_file_written_is_listed_and_read(home):
    uri = storage.join(home, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, bytes(range(200)))
    assert storage.exists(uri)
    assert storage.exists(storage.join(home, "a"))
    assert storage.read_bytes(uri) == bytes(range(200))
    assert storage.read_range(uri, 7, 12) == bytes(range(7, 12))
    [folder] = storage.list_folder(home)
    assert (folder.name, folder.is_folder) == ("a", True)
    [entry] = storage.list_folder(storage.join(home, "a"))
    assert (entry.name, entry.size, entry.is_folder) == ("b.bin", 200, False)
    assert entry == storage.entry(uri)
    assert storage.list_files(home) == ["a/b.bin"]
    for listed in (storage.list_folder, storage.list_files):
        assert listed(storage.join(home, "nothing")) == []


def test_entry_of_link_is_that_of_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    os.utime(tmp_path / "file", (50, 50))
    for name, target in (("a", "folder"), ("b", "file"), ("c", "nothing")):
        (tmp_path / name).symlink_to(tmp_path / target)
    a, b, c, *_ = storage.list_folder(str(tmp_path))
    assert (a.is_folder, b.is_folder, c.is_folder) == (True, False, False)
    assert (b.size, b.mark, c.size) == (5, "50.0", 0)
    assert [a, b] == [storage.entry(str(tmp_path / name)) for name in "ab"]


def test_remove_of_link_keeps_its_target(tmp_path):
    (tmp_path / "array.zarr").mkdir()
    (tmp_path / "array.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "array.zarr")
    outputs.remove(str(tmp_path / "link"))
    assert storage.list_files(str(tmp_path)) == ["array.zarr/zarr.json"]


def test_read_of_rewritten_object_is_refused(s3):
    storage.write_bytes(f"{s3}/x", b"before")
    etag = storage.entry(f"{s3}/x").etag
    assert storage.read_range(f"{s3}/x", 1, 3, etag) == b"ef"
    assert storage.read_bytes(f"{s3}/x", etag) == b"before"
    storage.write_bytes(f"{s3}/x", b"after!")
    before = storage.counters()
    for read in (storage.read_bytes, lambda uri, etag: storage.read_range(uri, 1, 3, etag)):
        with pytest.raises(InkdaskError) as caught:
            read(f"{s3}/x", etag)
        assert str(caught.value) == f"{s3}/x has changed since it was opened: run the job again."
    assert storage.counters().retries == before.retries


def test_mark_changes_with_the_file(home):
    uri = storage.join(home, "x")
    storage.write_bytes(uri, b"one")
    before = storage.entry(uri).mark
    storage.write_bytes(uri, b"two")
    assert before
    assert storage.entry(uri).mark != before


def test_put_file_copies_a_local_file(home, tmp_path):
    local = tmp_path / "local.bin"
    local.write_bytes(b"ink" * 1000)
    uri = storage.join(home, "sub", "copy.bin")
    storage.put_file(local, uri)
    assert storage.read_bytes(uri) == local.read_bytes()


def test_failed_local_write_leaves_the_old_file(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr("pathlib.Path.replace", _raise_disk_full)
    with pytest.raises(InkdaskError, match=r"No space is left to write .*file"):
        storage.write_bytes(uri, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert storage.read_bytes(uri) == b"old"


def _raise_disk_full(*_):
    raise OSError(28, "No space left on device")


def test_range_beyond_the_end_is_refused(home):
    uri = storage.join(home, "short")
    storage.write_bytes(uri, b"0123456789")
    with pytest.raises(InkdaskError, match=r"short is truncated: bytes 8 to 20 .* 2 are there"):
        storage.read_range(uri, 8, 20)


def test_missing_file_is_named(home):
    uri = storage.join(home, "nothing.tif")
    for read in (storage.read_bytes, storage.entry, lambda uri: storage.read_range(uri, 0, 5)):
        with pytest.raises(InkdaskError, match=r"nothing\.tif does not exist"):
            read(uri)


def test_missing_bucket_is_named_without_retries(s3):
    before = storage.counters()
    for ask in (storage.list_folder, storage.read_bytes):
        with pytest.raises(InkdaskError, match="bucket of s3://no-such-bucket/x does not exist"):
            ask("s3://no-such-bucket/x")
    assert storage.counters().retries == before.retries


def test_other_protocols_are_refused():
    with pytest.raises(InkdaskError, match="ftp://host/x is neither a local path nor an s3:"):
        storage.read_bytes("ftp://host/x")


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("inkdask.storage.files._read_local", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.read_range("/tmp/x", 0, 1)


@pytest.mark.parametrize(
    ("right", "ask"),
    [
        ("s3:ListBucket", storage.list_folder),
        ("s3:GetObject", storage.read_bytes),
        ("s3:GetObject", storage.exists),
        ("s3:GetObject", storage.entry),
        ("s3:PutObject", lambda uri: storage.write_bytes(uri, b"")),
        ("s3:PutObject", outputs.check_writable),
        ("s3:DeleteObject", outputs.remove),
    ],
)
def test_denied_access_names_the_right_without_retries(s3, faults, right, ask):
    storage.write_bytes(f"{s3}/layers/x", b"")
    allowed = "GET" if right == "s3:DeleteObject" else "nothing"
    faults.inject(["403"], match=f"^(?!{allowed})")
    before = storage.counters()
    says = rf"^Access to {s3}/layers is denied \({right}\): AccessDenied\.$"
    with pytest.raises(InkdaskError, match=says):
        ask(f"{s3}/layers")
    assert storage.counters().retries == before.retries


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("expired", "ExpiredToken ExpiredToken"), ("stranger", "InvalidAccessKeyId")],
)
def test_keys_that_are_not_accepted_are_named(s3, faults, kind, reason):
    faults.inject([kind])
    says = rf"{reason} \(the keys are those of AWS_ACCESS_KEY_ID\)\."
    for ask in (storage.list_folder, storage.entry, storage.exists, outputs.check_writable):
        with pytest.raises(InkdaskError, match=f"^Access to {s3}/x is denied: {says}$"):
            ask(f"{s3}/x")


@pytest.fixture
def role(s3, no_credentials, faults, monkeypatch, tmp_path):
    """Function that sets how a pod gets its role, with STS behind the proxy."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(s3_module, "TRIES", 2)
    (tmp_path / "token").write_text("token-of-the-pod")

    def give(**changed):
        given = {
            "AWS_ENDPOINT_URL_STS": faults.url,
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/ink",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            **changed,
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return give


def assert_all_say(sentence, place):
    """Check that a path which is not there is never taken for missing."""
    asks = (open_segment, storage.exists, storage.read_bytes, storage.zarr_node, storage.list_files)
    for ask in (*asks, outputs.check_writable):
        with pytest.raises(InkdaskError, match=sentence) as caught:
            ask(place)
        assert "\n" not in str(caught.value)


def test_role_of_a_service_account_reads_and_writes(s3, role):
    role()
    storage.write_bytes(f"{s3}/x", b"ink")
    assert storage.read_bytes(f"{s3}/x") == b"ink"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"},
            r"^AWS_WEB_IDENTITY_TOKEN_FILE /nowhere/token cannot be read: No such file.*\.$",
        ),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": ""}, r"^AWS_ROLE_ARN is set, and AWS_WEB_IDENTITY_TOKEN_"),
        ({"AWS_ROLE_ARN": ""}, r"^The AWS credentials cannot be used: AWS_ROLE_ARN is not set\.$"),
        (
            {"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"},
            r"^STS at http://127\.0\.0\.1:9/, which AWS_ROLE_ARN needs, cannot be reached\.$",
        ),
    ],
)
def test_incomplete_role_is_named(s3, role, changed, sentence):
    role(**changed)
    assert_all_say(sentence, f"{s3}/segment")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("403", ".*AccessDenied"), ("expired", ".*ExpiredToken"), ("other", "it is no STS")],
)
def test_role_that_is_refused_is_named(s3, role, faults, kind, reason, caplog):
    role()
    faults.inject([kind], match="POST /$")
    says = rf"^STS at {faults.url} \(AWS_ENDPOINT_URL_STS\) refuses the role of AWS_ROLE_ARN by "
    says += (
        rf"the token in AWS_WEB_IDENTITY_TOKEN_FILE {os.environ['AWS_WEB_IDENTITY_TOKEN_FILE']}: "
    )
    assert_all_say(f"{says}{reason}", f"{s3}/segment")
    traces = [it for it in caplog.records if it.exc_info and it.name != "asyncio"]
    assert not traces  # but for garbage of any earlier test


def test_public_bucket_is_read_without_credentials(s3, monkeypatch):
    for name in ("public", "private"):
        storage.write_bytes(f"{s3}/{name}", name.encode())
    storage.s3_filesystem().chmod(f"{s3}/public", "public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert storage.read_bytes(f"{s3}/public") == b"public"
    with pytest.raises(InkdaskError, match="no AWS credentials were found, and it is not open"):
        storage.read_bytes(f"{s3}/private")


def test_unknown_profile_is_named(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InkdaskError, match="profile .*nobody.* could not be found"):
        storage.read_bytes(f"{s3}/x")


def test_requester_pays_is_sent_with_every_request(s3, monkeypatch):
    storage.write_bytes(f"{s3}/folder/x", b"ink")
    asked = []

    def look(request, **_):
        asked.append((request.method, request.headers.get("x-amz-request-payer")))

    for payer, said in [(None, None), ("requester", b"requester")]:
        if payer:
            monkeypatch.setenv("AWS_REQUEST_PAYER", payer)
        client = storage.s3_filesystem().call_s3  # connects
        client("head_bucket", Bucket=s3.removeprefix("s3://"))
        storage.s3_filesystem().s3.meta.events.register("before-send.s3", look)
        asked.clear()
        assert [entry.name for entry in storage.list_folder(f"{s3}/folder")] == ["x"]
        assert storage.entry(f"{s3}/folder/x").size == 3
        assert storage.read_range(f"{s3}/folder/x", 1, 3) == b"nk"
        assert {method for method, _ in asked} == {"GET", "HEAD"}
        assert {value for _, value in asked} <= {said, said and said.decode()}


def test_connection_is_one_for_each_process_and_setting(s3, monkeypatch):
    assert storage.s3_filesystem() is storage.s3_filesystem()
    assert storage.s3_filesystem() is not storage.s3_filesystem(asynchronous=True)
    before = storage.s3_filesystem()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    assert storage.s3_filesystem() is not before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert storage.s3_filesystem() is not storage.s3_filesystem(asynchronous=True)


def test_array_that_is_gone_is_named_on_its_way_from_a_worker(tmp_path):
    from distributed.core import clean_exception, error_message

    uri = str(tmp_path / "x.zarr")
    stored = StoredArray(uri, zarr.create_array(uri, shape=(4, 4), chunks=(2, 2), dtype="u1"))
    shutil.rmtree(uri)
    with pytest.raises(InkdaskError) as caught:
        stored[:2, :2]
    told = error_message(caught.value)
    _, error, _ = clean_exception(told["exception"].data, told["traceback"].data)
    assert repr(error) == f"InkdaskError({f'{uri} does not exist.'!r})"


def test_pickled_connection_holds_no_credentials(s3):
    for connection in (storage.s3_filesystem(), storage.zarr_store(f"{s3}/x.zarr")):
        assert b"testing-secret" not in pickle.dumps(connection)
    assert pickle.loads(pickle.dumps(storage.s3_filesystem())) is storage.s3_filesystem()


def test_counters_count_bodies_and_requests(home):
    uri = storage.join(home, "x")
    storage.write_bytes(uri, bytes(1000))
    before = storage.counters()
    storage.read_range(uri, 0, 100)
    storage.read_bytes(uri)
    assert storage.counters() - before == storage.Counters(bytes_read=1100, requests=2, retries=0)


def test_zarr_store_counts_its_reads(home):
    uri = storage.join(home, "x.zarr")
    written = zarr.create_array(storage.zarr_store(uri), shape=(20, 20), chunks=(5, 20), dtype="u1")
    written[:] = pixels = np.arange(400).reshape(20, 20).astype(np.uint8)
    store = pickle.loads(pickle.dumps(storage.zarr_store(uri, read_only=True)))
    before = storage.counters()
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], pixels)
    assert (storage.counters() - before).bytes_read > 4 * 20


def test_open_array_is_opened_anew_for_another_version(tmp_path):
    uri = str(tmp_path / "x.zarr")
    zarr.create_array(uri, shape=(4,), chunks=(2,), dtype="u1")
    array = storage.open_array(uri, "1")
    array[1] = 7
    assert storage.open_array(uri, "1") is array
    zarr.create_array(uri, shape=(5,), chunks=(5,), dtype="u1", overwrite=True)
    assert storage.open_array(uri, "1").shape == (4,)
    assert storage.open_array(uri, "2").shape == (5,)


@pytest.mark.parametrize("kind", ["503", "reset", "truncate"])
def test_temporary_faults_are_retried_and_counted(s3, faults, kind):
    data = np.random.default_rng(0).bytes(100_000)
    storage.write_bytes(f"{s3}/x", data)
    faults.inject([kind], every=3, match="GET .*/x$")
    before = storage.counters()
    for start in range(0, 100_000, 10_000):
        assert storage.read_range(f"{s3}/x", start, start + 10_000) == data[start : start + 10_000]
    read = storage.counters() - before
    assert read.bytes_read == 100_000
    injected = faults.injected()[kind]
    assert injected >= 4
    # The HTTP client itself repeats a request whose idle connection was dropped.
    assert read.retries == injected or kind == "reset"


def test_writes_are_retried(s3, faults):
    faults.inject(["503", "reset"], every=2, match="PUT")
    for number in range(6):
        storage.write_bytes(f"{s3}/{number}", bytes([number]))
    faults.inject()
    assert [storage.read_bytes(f"{s3}/{number}") for number in range(6)] == [
        bytes([number]) for number in range(6)
    ]


def test_lasting_fault_is_raised_after_all_tries(s3, faults, monkeypatch):
    monkeypatch.setattr(s3_module, "TRIES", 3)
    faults.inject(["503"])
    with pytest.raises(InkdaskError, match=f"^{s3}/x: .*SlowDown"):
        storage.read_bytes(f"{s3}/x")
    assert faults.injected() == {"503": 3}


def test_silent_server_is_an_error_within_a_minute(s3, faults, monkeypatch):
    # Check the sum of the true limits, and wait for short ones.
    assert s3_module.TRIES_IN_SILENCE * (s3_module.READ_TIMEOUT + 1) < 60
    monkeypatch.setattr(s3_module, "READ_TIMEOUT", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new-connection")
    faults.inject(["stall"])
    with pytest.raises(UnavailableError, match=f"^{s3}/layers does not answer at {faults.url} "):
        storage.list_folder(f"{s3}/layers")
    assert faults.injected() == {"stall": s3_module.TRIES_IN_SILENCE}


@pytest.mark.parametrize("header", ["Last-Modified: by and by", "Content-Length: much", "A: b"])
def test_server_that_is_not_s3_is_named(no_credentials, monkeypatch, header):
    def answer(listener):
        while True:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(f"HTTP/1.1 200 OK\r\n{header}\r\n\r\n".encode())
            connection.close()

    monkeypatch.setattr(s3_module, "TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(InkdaskError, match=r"s3://b/x.*\.$"):
            storage.entry("s3://b/x")


def test_unreachable_endpoint_is_named(no_credentials, monkeypatch):
    monkeypatch.setattr(s3_module, "TRIES", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        UnavailableError, match=r"^s3://bucket/x cannot be reached at http://127\.0"
    ):
        storage.read_bytes("s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:8")  # wins
    with pytest.raises(UnavailableError, match=r"at http://127\.0\.0\.1:8 \(AWS_ENDPOINT_URL_S3\)"):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.parametrize(
    ("variable", "url", "asks"),
    [
        ("AWS_ENDPOINT_URL", "minio:9000", [storage.exists, storage.list_folder]),
        ("AWS_ENDPOINT_URL_S3", "http://minio_1:9000", [storage.zarr_node]),
        ("endpoint_url", "http://[::1", [storage.list_folder]),
    ],
)
def test_endpoint_that_is_no_url_is_named(
    no_credentials, monkeypatch, tmp_path, variable, url, asks
):
    if variable == "endpoint_url":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {url}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(variable, url)
    for ask in asks:
        with pytest.raises(SettingsError, match=rf"^{variable} must be a URL such as .*: Invalid "):
            ask("s3://bucket/x")


def in_a_fork(function):
    """Return the result of a function that a forked process calls."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function()))
    child.start()
    try:
        assert receiver.poll(60)
        return receiver.recv()
    finally:
        child.kill()  # its end would wait for threads that the fork cut off
        child.join(10)


def test_forked_process_connects_anew(s3):
    storage.write_bytes(f"{s3}/x", b"from the parent")
    assert in_a_fork(lambda: storage.read_bytes(f"{s3}/x")) == b"from the parent"


def test_forked_process_opens_arrays_anew(s3):
    uri, whole = f"{s3}/x.zarr", (slice(0, 4),)
    array = zarr.create_array(storage.zarr_store(uri), shape=(4,), chunks=(2,), dtype="u1")
    array[:] = 3
    stored = StoredArray(uri, array)
    assert stored[whole].tolist() == [3, 3, 3, 3]
    assert in_a_fork(lambda: stored[whole].tolist()) == [3, 3, 3, 3]


def test_copy_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    (tmp_path / "local").write_bytes(b"new")

    def full(_, path):
        Path(path).write_bytes(b"n")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InkdaskError, match="No space is left to write"):
        storage.put_file(tmp_path / "local", uri)
    assert storage.read_bytes(uri) == b"old"


@pytest.mark.parametrize("name", ["w012[fixed]", "seg?", "seg*", "seg[A]"])
def test_names_are_no_patterns(home, name):
    """S3 file systems take brackets and such for patterns, and then change the files of others."""
    others = [storage.join(home, other, "a.zarr") for other in ("segA", "segB", "w012f")]
    place = storage.join(home, name, "a.zarr")
    for uri in (*others, place):
        made = zarr.create_array(storage.zarr_store(uri), shape=(4,), chunks=(2,), dtype="u1")
        made[:] = 7
    before = storage.list_files(others[0])
    zarr.open_array(storage.zarr_store(place), mode="r+")[:2] = 0  # deletes an object
    assert storage.list_files(place) == ["c/1", "zarr.json"]
    target = storage.join(home, name, "b.zarr")
    outputs.replace_tree(place, target)
    assert zarr.open_array(storage.zarr_store(target), mode="r")[:].tolist() == [0, 0, 7, 7]
    assert not storage.exists(place)
    zarr.create_array(
        storage.zarr_store(target), shape=(4,), chunks=(2,), dtype="u1", overwrite=True
    )
    assert storage.list_files(target) == ["zarr.json"]
    outputs.remove(target)
    assert not storage.exists(target)
    assert [storage.list_files(other) for other in others] == [before] * 3


def test_leftovers_of_killed_writers_are_swept(home):
    folder = storage.join(home, "predictions")
    target = storage.join(folder, "prediction_demo_00_26")
    kept = [
        "prediction_demo_00_26.zarr/zarr.json",
        "prediction_other_00_26.zarr.0123abcd.unfinished/zarr.json",
        "prediction_demo_00_26.of mine.unfinished/zarr.json",
    ]
    left = [
        "prediction_demo_00_26.zarr.0123abcd.unfinished/0/c/0/0",
        "prediction_demo_00_26_preview.zarr.89abcdef.unfinished/zarr.json",
        ".prediction_demo_00_26.png.0123abcd.part",
    ]
    for file in kept + left:
        storage.write_bytes(storage.join(folder, file), b"")
    outputs.sweep(target)  # their writers may be at work
    assert sorted(storage.list_files(folder)) == sorted(kept + left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs.time, "time", lambda: time.monotonic() + 2**31)
        outputs.sweep(target)
    assert sorted(storage.list_files(folder)) == sorted(kept)
    outputs.sweep(storage.join(home, "nothing", "x"))


def test_result_that_may_not_be_removed_is_emptied(s3, faults):
    storage.write_bytes(f"{s3}/result.txt", b"an earlier job")
    faults.inject(["403"], match="DELETE ")
    outputs.remove_file(f"{s3}/result.txt")
    outputs.remove_file(f"{s3}/nothing.txt")
    assert storage.list_files(s3) == ["result.txt"]
    assert storage.read_bytes(f"{s3}/result.txt") == b""


def test_place_is_checked_without_a_trace_where_nothing_may_be_removed(s3, faults):
    storage.write_bytes(f"{s3}/there.png", b"ink")
    faults.inject(["403"], match="DELETE |POST ")
    for name in ("there.png", "a/new.png"):
        outputs.check_writable(f"{s3}/{name}")
    assert storage.list_files(s3) == ["there.png"]
    assert storage.read_bytes(f"{s3}/there.png") == b"ink"
