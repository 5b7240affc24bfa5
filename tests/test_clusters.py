"""Jobs on worker processes of their own, one for each GPU, or on a running scheduler."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import dask
import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client, LocalCluster
from PIL import Image

import inkdask
from inkdask import cli, engine, failures, storage, workflow
from inkdask.clusters import connection, local, report
from inkdask.errors import InkdaskError, UnavailableError
from inkdask.models import hardware
from inkdask.segment import open_labels
from inkdask.settings import Settings
from tests.conftest import free_port, start_server
from tests.files import read_picture, write_layers
from tests.nvml import build_nvml
from tests.oracle import assert_same_picture, depth_slope, naive_map, papyrus, picture
from tests.test_runs import wait_until

LAYERS, HEIGHT, WIDTH = 5, 150, 280
REPOSITORY = Path(__file__).parent.parent


def network(x):
    """Return logits of the first and last layer, (b, 1, 4, 4), and write down where it runs."""
    from distributed import Status
    from distributed.worker import Worker

    where = {"process": os.getpid(), "threads": torch.get_num_threads()}
    for worker in (worker for worker in Worker._instances if worker.status is Status.running):
        where |= {
            "name": worker.name,
            "nthreads": worker.state.nthreads,
            "resources": worker.state.total_resources,
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
    with Path(os.environ["PLACES"]).open("a") as places:
        places.write(json.dumps(where) + "\n")
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)


def broken(x):
    """Fail on tiles with data; the probe is one tile of zeros."""
    if x.any():
        raise ValueError("the tiles are upside down")
    return x[:, :, 0, :4, :4]


@pytest.fixture(autouse=True)
def own_places(own_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("PLACES", str(tmp_path / "places"))
    monkeypatch.setattr(engine, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def volume():
    return papyrus((LAYERS, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    write_layers(tmp_path / "segment" / "layers", volume)
    return str(tmp_path / "segment")


@pytest.fixture(scope="module")
def scheduler():
    """Address of a scheduler with one worker process, which jobs must leave running."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def assert_right(uri, volume):
    assert_same_picture(read_picture(uri), picture(naive_map(volume, network)), share=1e-3)


def places(tmp_path):
    """Return the distinct places where tiles ran."""
    lines = set((tmp_path / "places").read_text().splitlines())
    found = [json.loads(line) for line in lines]
    return [place for place in found if "name" in place]  # without the probe in this process


def test_forward_pass_uses_the_cores_of_its_worker():
    """A worker of one core has two threads, of which one reads ahead."""
    from distributed import Client

    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    with Client(processes=False, **options) as client:
        assert client.submit(hardware.cores).result() == 2
    with Client(processes=False, resources={"cores": 1}, **options) as client:
        assert client.submit(hardware.cores).result() == 1


@pytest.mark.parametrize("variable", ["CLUSTER", "SCHEDULER_ADDRESS", "DASK_SCHEDULER_ADDRESS"])
def test_run_uses_a_running_scheduler_and_leaves_it_running(
    variable, scheduler, segment, volume, tmp_path, monkeypatch, caplog
):
    from distributed import Client

    monkeypatch.setenv("PLACES", str(tmp_path / "places"))
    monkeypatch.setenv(variable, scheduler)
    with caplog.at_level(logging.INFO, "inkdask"):
        uri = inkdask.run(segment, model=elsewhere(tmp_path))
    assert_right(uri, volume)
    assert [place["process"] for place in places(tmp_path)] == workers(scheduler)
    assert "Dashboard of the cluster: http" in caplog.text
    assert engine.current_client() is None
    with Client(scheduler) as client:
        assert client.scheduler_info()["workers"]


def test_patience_follows_the_settings_of_dask(monkeypatch):
    assert connection._patience() == connection.PATIENCE
    with dask.config.set({"distributed.comm.timeouts.connect": "600s"}):
        assert connection._patience() == "600s"


DOOMED = """
import sys, time
from distributed import LocalCluster

if __name__ == "__main__":
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2}
    with LocalCluster(scheduler_port=int(sys.argv[1]), dashboard_address=None, **options):
        time.sleep(600)
"""


@pytest.fixture
def doomed(tmp_path):
    """Address of a cluster that is one process, and that process."""
    (tmp_path / "doomed.py").write_text(DOOMED)
    port = free_port()
    process = start_server(str(tmp_path / "doomed.py"), str(port), port=port)
    yield f"tcp://127.0.0.1:{port}", process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_run_reports_scheduler_that_died(segment, doomed):
    address, _ = doomed

    def deadly(x):
        if x.any():
            os.kill(os.getpid(), signal.SIGKILL)
        return x[:, :, 0, ::16, ::16]

    with pytest.raises(InkdaskError, match=f"scheduler at {address} is gone; what is finished"):
        inkdask.run(segment, model=deadly, cluster=address)


def close_client(process):
    """Kill a cluster, and wait until the client of this process gives it up."""
    client = engine.current_client()
    client._timeout = 0.1  # seconds for a new connection; the first one has its full time
    process.kill()
    wait_until(lambda: client.status == "closed")


def test_run_that_lost_its_scheduler_does_not_go_on_elsewhere(segment, doomed, monkeypatch):
    address, process = doomed
    monkeypatch.setattr(workflow, "check_memory", lambda _: close_client(process))
    with pytest.raises(UnavailableError, match="is gone; what is finished is kept"):
        inkdask.run(segment, model=network, cluster=address)


def test_second_try_without_scheduler_does_not_run_elsewhere(doomed, monkeypatch):
    address, process = doomed
    monkeypatch.setattr(engine, "time", SimpleNamespace(sleep=lambda _: close_client(process)))
    task, results = dask.delayed(failures.caught)(KeyError("odd")), {}
    with (
        Client(address),
        pytest.raises(UnavailableError, match=f"scheduler at {address} is gone"),
    ):
        engine.compute_each([task], results.__setitem__, lambda _: dask.delayed(1))
    assert results == {}


def test_workers_that_are_lost_do_not_stop_the_others_from_being_asked():
    from distributed.comm import CommClosedError

    def name(dask_worker):
        if dask_worker.name == 0:
            raise CommClosedError("in <TCP>: Stream is closed")
        return dask_worker.name

    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with Client(n_workers=2, **options):
        assert engine.on_workers(name) == [1]


OTHER = {
    "old": "__version__ = '0.0.1'",
    "none": "raise ModuleNotFoundError('No module named inkdask')",
    "broken": "raise ValueError('half installed')",
}


@pytest.fixture
def start_dask(tmp_path):
    """Start a program of Dask that meets another ``inkdask`` before the installed one."""
    processes = []

    def start(program, other, *words):
        (tmp_path / other).mkdir(exist_ok=True)
        (tmp_path / other / "inkdask.py").write_text(OTHER[other])
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--no-dashboard"]
        process = subprocess.Popen(
            [*command, *words],
            env={**os.environ, "PYTHONPATH": str(tmp_path / other)},
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )
        processes.append(process)

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_run_refuses_scheduler_and_workers_with_another_inkdask(segment, start_dask, tmp_path):
    from distributed import Client

    address = f"tcp://127.0.0.1:{free_port()}"
    scheduler = ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    start_dask("scheduler", "none", *scheduler)
    for other in OTHER:
        start_dask("worker", other, address, "--no-nanny", "--name", other)
    with Client(address, timeout=60) as client:  # as in a notebook
        client.wait_for_workers(len(OTHER), timeout=60)
        workers = client.scheduler_info(n_workers=-1)["workers"].items()
        where = {worker["name"]: f"the worker at {at} has " for at, worker in workers}
        with pytest.raises(InkdaskError) as of_client:
            inkdask.run(segment, model=network)
    with pytest.raises(InkdaskError) as of_address:
        inkdask.run(segment, model=network, cluster=address)
    for caught in (of_client, of_address):
        said = str(caught.value)
        version = inkdask.__version__
        assert said.startswith(
            f"This process has inkdask {version}, but the scheduler at {address}"
        )
        assert said.endswith(
            f" and 1 more differ too: install inkdask {version} there, and start the cluster again."
        )
        assert f"the scheduler at {address} has none, " in said
        told = {"old": "0.0.1", "none": "none", "broken": "a broken one (half installed)"}
        assert sum(where[name] + what in said for name, what in told.items()) == 2
    assert not list(Path(segment).rglob("*.png"))
    assert not places(tmp_path)


def test_connect_accepts_scheduler_without_workers_and_says_so(caplog):
    from distributed import LocalCluster

    options = {"processes": False, "protocol": "tcp://", "dashboard_address": None}
    for count in (0, 1):
        with LocalCluster(n_workers=count, **options) as cluster:
            settings = Settings.of(cluster=cluster.scheduler_address)
            with connection.connect(settings) as client:
                assert len(client.scheduler_info()["workers"]) == count
                waits = f"The scheduler at {cluster.scheduler_address} has no workers: the job"
                assert (waits in caplog.text) == (not count)
            caplog.clear()


def elsewhere(tmp_path):
    """Return the network with a fixed PLACES, because the workers' environment lacks it."""
    place = str(tmp_path / "places")

    def network_elsewhere(x):
        os.environ["PLACES"] = place
        return network(x)

    return network_elsewhere


def workers(scheduler):
    from distributed import Client

    with Client(scheduler) as client:
        return list(client.run(os.getpid).values())


@pytest.mark.parametrize("protocol", ["tcp", "tls"])
def test_run_reports_address_without_scheduler(protocol, segment, monkeypatch, capsys):
    assert connection.PATIENCE <= 10
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    address = f"{protocol}://127.0.0.1:{free_port()}"
    job = ["run", segment, "--model", "demo", "--layers", "0:5", "--model-in-chans", "5"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*job, "--cluster", address])
    assert exit_.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"inkdask: The scheduler at {address} cannot be used: ")
    assert not list(Path(segment).rglob("*.png"))


def test_tls_takes_certificates_from_the_settings_of_dask(segment, volume, tmp_path):
    from distributed import LocalCluster
    from distributed.security import Security

    certificate, key = map(str, self_signed(tmp_path))
    tls = "distributed.comm.tls"
    pairs = {
        f"{tls}.{role}.{what}": file
        for role in ("scheduler", "worker", "client")
        for what, file in (("cert", certificate), ("key", key))
    }
    with dask.config.set({f"{tls}.ca-file": certificate, **pairs}):
        options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
        options |= {"processes": False, "protocol": "tls://", "security": Security()}
        with LocalCluster(**options) as cluster:
            address = cluster.scheduler_address
            assert address.startswith("tls://")
            uri = inkdask.run(segment, model=network, cluster=address)
            assert_right(uri, volume)
            assert places(tmp_path)
            with (
                dask.config.set({f"{tls}.client.cert": None, f"{tls}.client.key": None}),
                pytest.raises(InkdaskError, match=f"The scheduler at {address} cannot be used"),
            ):
                inkdask.run(segment, model=network, cluster=address, overwrite=True)


def self_signed(folder):
    """Make a self-signed certificate for this machine, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "inkdask tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    pem = serialization.Encoding.PEM
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.mark.slow
@pytest.mark.parametrize("where", ["threads", "scheduler"])
@pytest.mark.parametrize("fails", [False, True])
def test_report_is_written_also_when_the_job_fails(where, fails, segment, tmp_path, request):
    cluster = where if where == "threads" else request.getfixturevalue(where)
    page = tmp_path / "pages" / "report.html"
    model = broken if fails else elsewhere(tmp_path)
    options = {"model": model, "cluster": cluster, "report": str(page)}
    if fails:
        with pytest.raises(InkdaskError, match="upside down"):
            inkdask.run(segment, **options)
    else:
        inkdask.run(segment, **options)
    html = page.read_text()
    assert "bokeh" in html.lower()
    assert "https://cdn.bokeh.org" not in html.split("<body")[0]
    assert len(html) > 1_000_000  # with the scripts, so that it shows without a network
    assert fails or "save_chunk" in html


def test_report_lets_workers_measure_profiles_of_deep_stacks(tmp_path):
    """Else distributed warns that the size of a dict cannot be calculated."""
    profile, limit = {}, sys.getrecursionlimit()
    for _ in range(300):
        profile = {"children": {"frame": profile}}
    with pytest.raises(RecursionError):
        sizeof(profile)
    worker = LocalCluster(n_workers=1, processes=False, dashboard_address=None)
    try:
        with worker, Client(worker), report(str(tmp_path / "report.html")):
            assert sizeof(profile) > 0
    finally:
        sys.setrecursionlimit(limit)


def test_run_without_its_report_leaves_no_result_file(segment, tmp_path, monkeypatch):
    """The result file is written last of all."""

    def refused(*_):
        raise InkdaskError("no room for report.html")

    monkeypatch.setattr(storage, "put_file", refused)
    with pytest.raises(InkdaskError, match="no room for report"):
        inkdask.run(segment, model=network, report=str(tmp_path / "report.html"))
    assert not (tmp_path / "result.txt").exists()


def test_report_is_written_to_s3(segment, s3):
    inkdask.run(segment, model=network, report=f"{s3}/pages/report.html")
    assert b"save_chunk" in storage.read_bytes(f"{s3}/pages/report.html")


def test_run_refuses_unwritable_report_before_the_work(segment, tmp_path):
    (tmp_path / "file").touch()
    report = str(tmp_path / "file" / "report.html")
    for work in (inkdask.check, inkdask.run):
        with pytest.raises(InkdaskError, match=r"report\.html cannot be written: .* set REPORT to"):
            work(segment, model=broken, report=report)


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDKEY0001",
    "AWS_SECRET_ACCESS_KEY": "marked-secret-0002",
    "AWS_SESSION_TOKEN": "marked-session-0003",
    "HF_TOKEN": "hf_marked0004",
}


@pytest.mark.slow
def test_local_workers_share_the_cores_and_no_secret_leaves_the_process(
    s3, volume, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setattr(local, "CPU_COUNT", 12)
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    sent = []
    compute_each = engine.compute_each

    def recording(tasks, *rest, **options):
        sent.append(cloudpickle.dumps(tasks))
        return compute_each(tasks, *rest, **options)

    monkeypatch.setattr(engine, "compute_each", recording)
    write_layers(f"{s3}/segment/layers", volume)
    homes = {name: f"{s3}/{name}" for name in ("zarr_output_dir", "result_file")}
    with caplog.at_level(logging.DEBUG, "inkdask"):
        uri = inkdask.run(
            f"{s3}/segment", model=network, cluster="local", max_workers=2,
            report=str(tmp_path / "report.html"), **homes,
        )  # fmt: skip
    assert_right(uri, volume)

    found = places(tmp_path)
    assert {place["name"] for place in found} <= {0, 1}
    assert os.getpid() not in {place["process"] for place in found}
    for place in found:
        assert place["nthreads"] == place["threads"] == place["resources"]["cores"] == 6

    left = {"graph": b"".join(sent), "log": caplog.text.encode()}
    left["output"] = "".join(capfd.readouterr()).encode()
    files = storage.s3_filesystem()
    left |= {name: files.cat_file(name) for name in files.find(s3.removeprefix("s3://"))}
    left |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"graph", "log", "output", str(tmp_path / "report.html")} < left.keys()
    assert len(left["graph"]) > 1000
    told = [(name, variable) for name, data in left.items() for variable, secret in SECRETS.items()
            if secret.encode() in data]  # fmt: skip
    assert not told


@pytest.fixture
def own_client():
    with connection.connect(Settings.of(cluster="local", max_workers=1)) as client:
        yield client


def test_local_cluster_refuses_everybody_else(own_client):
    """Loopback alone keeps out no other user of the machine, who could run code on a worker."""
    from distributed import Client
    from distributed.security import Security

    [(worker, found)] = own_client.scheduler_info()["workers"].items()
    addresses = {own_client.scheduler.address, worker, found["nanny"]}
    assert len(addresses) == 3
    for address in addresses:
        assert address.startswith("tls://127.0.0.1:")
        options = {"timeout": 5, "set_as_default": False}
        with pytest.raises(OSError):
            Client(address.replace("tls://", "tcp://"), **options)
        with pytest.raises(OSError, match="certificate"):
            Client(address, security=Security.temporary(), **options)
    assert own_client.submit(os.getpid).result() != os.getpid()


@pytest.mark.slow
def test_local_workers_leave_ctrl_c_to_this_process_also_after_a_restart(own_client):
    def look():
        return os.getpid(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    [(first, blocks)] = own_client.run(look).values()
    assert blocks
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(first, signal.SIGKILL)
    second, blocks = own_client.submit(look, pure=False).result(60)
    assert second != first
    assert blocks


@pytest.mark.slow
def test_local_cluster_is_silent_about_a_taken_dashboard(recwarn):
    from inkdask.clusters.local import DASHBOARD, local

    host, port = DASHBOARD.split(":")
    with socket.socket() as taken:
        with suppress(OSError):  # another program has it
            taken.bind((host, int(port)))
            taken.listen()
        with local(1) as client:
            assert not client.dashboard_link.endswith(f":{port}/status")
    assert not [it for it in recwarn if "already in use" in str(it.message)]


@pytest.mark.slow
def test_ctrl_c_says_one_sentence_with_local_workers(segment, tmp_path):
    """A terminal sends it to every process of the command."""
    command = [sys.executable, "-m", "inkdask", "run", segment, "--model", "demo"]
    command += ["--model-in-chans", "5", "--layers", "0:5", "--stride", "1", "--cluster", "local"]
    command += ["--max-workers", "2", "--chunk-size", "128", "--direction", "forward"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("ink: "):
                os.killpg(process.pid, signal.SIGINT)
                break
        said += process.stderr.readlines()
    assert process.returncode == 130
    told = [line for line in said if line.strip() and not line.startswith("ink: ")]
    assert len(told) == 3, said
    assert told[0].startswith(segment)
    assert told[1].startswith("Dashboard of the cluster: ")
    assert told[2].startswith("inkdask: interrupted; what is done is kept")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folder of a stand-in for NVML, the library that lists the GPUs of a machine."""
    pytest.importorskip("dask_cuda")
    return build_nvml(tmp_path_factory.mktemp("nvml"))


GPU_JOB = """
if __name__ == "__main__":  # worker processes run the lines before, and torch takes seconds
    import json, os
    import inkdask
    from inkdask.clusters import connect
    from inkdask.settings import Settings
    from tests.test_clusters import network

    found = []
    for variables in [{}, {"CUDA_VISIBLE_DEVICES": "1", "MAX_WORKERS": "8"}, {"MAX_WORKERS": "1"}]:
        os.environ |= variables
        with connect(Settings.of()) as client:
            assert client.scheduler.address.startswith("tls://127.0.0.1:")
            workers = client.scheduler_info()["workers"].values()
            threads = {worker["name"]: worker["nthreads"] for worker in workers}
            gpus = sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values())
            if not variables:
                uri = inkdask.run(model=network, cluster="threads")  # on the current client
        for variable in variables:
            os.environ.pop(variable, None)
        found.append([threads, gpus])
    print(json.dumps([found, uri]))
"""


@pytest.mark.slow
def test_cuda_cluster_has_one_worker_for_each_named_gpu(library, segment, volume, tmp_path):
    """With two GPUs: all, one that is named (and more workers allowed), one worker at most."""
    (tmp_path / "job.py").write_text(GPU_JOB)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "FAKE_GPUS": "2",
        "PYTHONPATH": str(REPOSITORY),
        "CLUSTER": "cuda",
        "S3_PATH": segment,
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, uri = json.loads(done.stdout)
    assert found == [
        [{"0": 8, "1": 8}, ["0,1", "1,0"]],
        [{"1": 8}, ["1"]],
        [{"0": 8}, ["0,1"]],
    ]
    assert {place["gpu"] for place in places(tmp_path)} <= {"0,1", "1,0"}
    assert_right(uri, volume)


def test_cuda_cluster_reports_missing_gpu(segment):
    pytest.importorskip("dask_cuda")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(InkdaskError, match="--cluster cuda finds no GPU"):
        inkdask.run(segment, model=network, cluster="cuda")


@pytest.mark.slow
def test_script_without_main_guard_runs_on_local_workers(segment, tmp_path):
    """A process that Python starts would run the script of its parent first."""
    script = tmp_path / "script.py"
    words = (
        f"{str(segment)!r}, model=model, tile=64, stride=32, cluster='local', max_workers=1, "
        f"zarr_output_dir={str(tmp_path / 'grids')!r}, output_path={str(tmp_path / 'out')!r}, "
        f"result_file={str(tmp_path / 'result')!r}"
    )
    model = "def model(x):\n    return x.mean(2)[:, :, ::16, ::16]\n"
    script.write_text(f"import inkdask\n{model}inkdask.run({words})\nprint(__file__)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == str(script)
    assert (tmp_path / "result").exists()


@pytest.mark.slow
def test_relative_paths_mean_those_of_the_client(segment, volume, tmp_path, monkeypatch):
    """Workers may have been started in another folder."""
    from distributed import Client, LocalCluster

    monkeypatch.chdir(tmp_path)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        (tmp_path / "elsewhere").mkdir()
        client.run(os.chdir, str(tmp_path / "elsewhere"))
        for folder, value in (("", 255), ("elsewhere", 0)):
            Image.new("L", volume.shape[:0:-1], value).save(tmp_path / folder / "mask.png")
        uri = inkdask.run(
            "segment", model=depth_slope, tile=64, stride=32, zarr_output_dir="grids",
            output_path="out", result_file="result", mask_path="mask.png",
        )  # fmt: skip
        assert read_picture(uri).any()  # the client's mask has papyrus
        prediction = os.path.relpath(uri.replace(".png", ".zarr"), tmp_path)
        inkdask.export(prediction, ["copy.zarr"])
        assert open_labels("mask.png", volume.shape[1:]).all().compute()
    assert list((tmp_path / "grids").glob("*.zarr"))
    assert (tmp_path / "copy.zarr").is_dir()
    assert [it.name for it in (tmp_path / "elsewhere").iterdir()] == ["mask.png"]
