"""Jobs on Kubernetes: a small one for tests (tests/kubernetes) with the real Dask operator."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import kr8s
import numpy as np
import pytest
import yaml
from PIL import Image

from inkdask.clusters import pods as pods_module
from inkdask.clusters.kubernetes import cluster_manifest, kubernetes
from inkdask.clusters.pods import pods_of, summary
from inkdask.errors import InkdaskError, SettingsError
from inkdask.settings import Settings
from tests.kubernetes.world import kubeconfig
from tests.manifests import CLUSTER, only, problems, render

JOB = {"s3_path": "s3://scrolls/seg", "model": "demo", "zarr_output_dir": "s3://scrolls/parts"}


def settings(**given):
    return Settings.of(**{**JOB, **given})


# On a busy machine; and one small Kubernetes for all.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("kubernetes")]


# The manifest


def test_manifest_of_a_job_equals_the_applied_one():
    own = only(render(CLUSTER / "base"), "DaskCluster")
    made = cluster_manifest(settings(min_workers=2, cluster_image="here/inkdask:7"))
    assert problems(made) == []
    name = made["metadata"]["name"]
    assert made["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
    assert made["spec"]["worker"]["replicas"] == 2
    for part in ("scheduler", "worker"):
        pod, base = made["spec"][part]["spec"], own["spec"][part]["spec"]
        assert pod["containers"][0].pop("image") == "here/inkdask:7"
        base["containers"][0].pop("image")
        assert pod == base
    assert cluster_manifest(settings())["metadata"]["name"] != name


def test_manifest_of_a_job_follows_the_standing_cluster():
    standing = only(render(CLUSTER), "DaskCluster")
    made = cluster_manifest(settings(), standing)
    assert problems(made) == []
    assert made["spec"]["worker"]["spec"] == standing["spec"]["worker"]["spec"]
    assert made["metadata"]["name"] != standing["metadata"]["name"] == "inkdask"
    assert standing["spec"]["worker"]["replicas"] == 0  # as it was


def test_cluster_spec_takes_the_cluster_that_kustomize_prints(tmp_path):
    file = tmp_path / "cluster.yaml"
    documents = render(CLUSTER)
    only(documents, "DaskCluster")["spec"]["worker"]["spec"]["nodeSelector"] = {"gpu": "big"}
    file.write_text(yaml.safe_dump_all(documents))
    made = cluster_manifest(settings(cluster_spec=str(file)))
    assert made["spec"]["worker"]["spec"]["nodeSelector"] == {"gpu": "big"}
    assert "namespace" not in made["metadata"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not YAML"),
        ("kind: Pod", "one complete DaskCluster"),
        ("just words", "one complete DaskCluster"),
        ("kind: DaskCluster\nspec: {}", "one complete DaskCluster"),
    ],
)
def test_cluster_spec_without_a_cluster_is_refused(tmp_path, text, sentence):
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=f"CLUSTER_SPEC: .*cluster.yaml.*{sentence}"):
        cluster_manifest(settings(cluster_spec=str(file)))


# Mistakes that are found before anything is made


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"zarr_output_dir": "/tmp/partitions"}, "ZARR_OUTPUT_DIR"),
        ({"s3_path": "/data/seg"}, "S3_PATH"),
        ({"output_path": "pictures"}, "OUTPUT_PATH"),
        ({"model": __file__}, "MODEL"),
    ],
)
def test_kubernetes_refuses_local_paths(given, variable):
    with pytest.raises(SettingsError, match=f"^{variable}: .*do not see"):  # noqa: SIM117
        with kubernetes(settings(**given)):
            pass


def test_kubernetes_refuses_min_workers_above_max_workers():
    wrong = settings(min_workers=3, max_workers=2)
    with pytest.raises(SettingsError, match="MIN_WORKERS .3. is more than MAX_WORKERS .2."):  # noqa: SIM117
        with kubernetes(wrong):
            pass


def test_kubernetes_reports_missing_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InkdaskError, match="Kubernetes cannot be reached"):  # noqa: SIM117
        with kubernetes(settings(mask_path="none")):  # which is no path of this machine
            pass


# What a wait for pods says


def pod(component, phase="Pending", ready=False, waiting=None, conditions=()):
    status = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": str(ready)}, *conditions],
        "containerStatuses": [{"state": {"waiting": waiting} if waiting else {"running": {}}}],
    }
    return SimpleNamespace(labels={"dask.org/component": component}, raw={"status": status})


def test_summary_counts_pods_with_their_reasons():
    full = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: no GPU."}
    pods = [
        pod("scheduler", "Running", ready=True),
        pod("worker", conditions=[full]),
        pod("worker", conditions=[full]),
        pod("worker", "Running"),
        pod("worker", waiting={"reason": "ContainerCreating"}),
        pod("worker", waiting={"reason": "ImagePullBackOff", "message": "no such image"}),
    ]
    assert summary(pods) == (
        "scheduler running, 2 workers pending (0/3 nodes: no GPU), 1 worker starting, "
        "1 worker pending, 1 worker pending (ImagePullBackOff: no such image)"
    )
    assert summary([]) == "waiting for the operator"


def test_pods_are_listed_although_the_server_was_away(monkeypatch):
    answers = iter([httpx.ConnectError("refused"), kr8s.APITimeoutError("late"), ["pod"]])

    def get(kind, namespace, label_selector):
        assert (kind, namespace) == ("pods", "ns")
        assert label_selector == {"dask.org/cluster-name": "ink"}
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(kr8s, "get", get)
    monkeypatch.setattr(pods_module, "INTERVAL", 0.01)
    assert pods_of("ink", "ns") == ["pod"]


# The real operator


class World:
    """Handle of the small Kubernetes, outside of its network."""

    def __init__(self, process, folder):
        self.process, self.folder, self.programs = process, folder, 0
        self.inside = ["nsenter", "--target", str(process.pid), "--net", "--mount"]
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(CLUSTER.parent),
            "HOME": str(folder),
            "KUBECONFIG": str(folder / "operator.kubeconfig"),
        }

    def start(self, *command, **environment):
        """Start a program in this world; ``.said()`` is its output, ``.told()`` its errors."""
        self.programs += 1
        files = [self.folder / f"program{self.programs}.{kind}" for kind in ("out", "err")]
        with files[0].open("w") as out, files[1].open("w") as err:
            process = subprocess.Popen(
                [*self.inside, *map(str, command)],
                env={**self.environment, **environment},
                stdout=out,
                stderr=err,
                cwd=CLUSTER.parent,
            )
        process.said, process.told = files[0].read_text, files[1].read_text
        return process

    def call(self, *command, **environment):
        process = self.start(*command, **environment)
        assert process.wait(300) == 0, (command, process.said(), process.told())
        return process.said()

    def get(self, kind):
        """Objects of a kind in the namespace."""
        text = self.call("kubectl", "get", kind, "--namespace", "inkdask", "-o", "json")
        return json.loads(text)["items"]

    def wait(self, found, seconds=240):
        """Wait until something is found, and return it."""
        end = time.monotonic() + seconds
        while not (it := found()):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.5)
        return it

    def clusters(self):
        """Names of all objects of Dask clusters, without those of the standing cluster."""
        kinds = "daskjobs,daskclusters,daskworkergroups,daskautoscalers,deployments,services,pods"
        names = {f"{o['kind']}/{o['metadata']['name']}" for o in self.get(kinds)}
        assert "DaskCluster/inkdask" in names
        standing = r"\w+/inkdask(-default(-worker-\w+(-\w+)?)?|-scheduler(-\w+)?)?"
        return sorted(name for name in names if not re.fullmatch(standing, name))

    def logs(self):
        files = [*self.folder.glob("*.log"), *self.folder.glob("pods/*/log")]
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)

    def picture(self, uri):
        """The pixels of a PNG."""
        file = self.folder / "picture.png"
        code = "import sys; from inkdask import storage; "
        code += "open(sys.argv[2], 'wb').write(storage.read_bytes(sys.argv[1]))"
        self.call(sys.executable, "-c", code, uri.strip(), file, **STORAGE)
        return np.asarray(Image.open(file))

    def start_job(self, code="", **settings):
        """Start a job as a user who has no more rights than the service account."""
        usual = {
            "MODEL": "demo",
            "S3_PATH": "s3://scrolls/seg",
            "START_LAYER": "0",
            "END_LAYER": "26",
            "CHUNK_SIZE": "128",
            "CLUSTER": "kubernetes",
            "CLUSTER_NAMESPACE": "inkdask",
            "MIN_WORKERS": "2",
            "MAX_WORKERS": "2",
            "ZARR_OUTPUT_DIR": "s3://scrolls/parts",
            "RESULT_FILE": str(self.folder / "result.txt"),
            "KUBECONFIG": str(self.folder / "user.kubeconfig"),
        }
        program = f"{code}\nfrom inkdask.cli import main; main(['run'])"
        return self.start(sys.executable, "-c", program, **{**STORAGE, **usual, **settings})


GPU_SPEC = str(CLUSTER / "base/dask-cluster.yaml")
ENDPOINT = "http://10.9.0.1:15000"
STORAGE = {
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def can_unshare():
    """Whether this process may make networks and mounts of its own."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip", "mount")))
    if not tools or os.geteuid() != 0:
        return False
    needed = [
        "ip link set lo up",
        "ip link add node type bridge",
        "ip link add one type veth peer name other",
        "mount --bind /etc/hosts /etc/hosts",
    ]
    probe = ["unshare", "--net", "--mount", "sh", "-c", " && ".join(needed)]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Kubernetes with the operator, and with the manifests applied as an admin does."""
    if not can_unshare():
        pytest.skip("needs root, and unshare, nsenter, ip and mount")
    folder = tmp_path_factory.mktemp("kubernetes")
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", sys.executable, "-m", "tests.kubernetes.world", folder],
        stdout=subprocess.PIPE, text=True, cwd=CLUSTER.parent,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        world = World(process, folder)
        apply(world)
        code = "from inkdask import storage; from tests.test_kubernetes import upload; "
        code += "storage.s3_filesystem().mkdir('scrolls'); upload()"
        world.call(sys.executable, "-c", code, **STORAGE)
        yield world
    finally:
        process.terminate()
        process.wait(60)


def upload():
    from tests.files import random_volume, write_layers

    write_layers("s3://scrolls/seg/layers", random_volume((26, 400, 500)))


def replace(file, *changes):
    """Edit a file."""
    text = file.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)


def apply(world):
    """Edit the overlay as the README tells, apply it, and make the Secret."""
    copy = shutil.copytree(CLUSTER, world.folder / "cluster")
    replace(
        copy / "overlays/site/kustomization.yaml",
        ("newName: registry.example.com/inkdask", "newName: inkdask"),
        ("newTag: 0.1.0", "newTag: test"),
        ("s3://my-bucket/inkdask/partitions", "s3://scrolls/parts"),
        ("# - AWS_ENDPOINT_URL=https://s3.example.com", f"- AWS_ENDPOINT_URL={ENDPOINT}"),
        ("# - ../../components/cpu", "- ../../components/cpu"),
        ("# - ../../components/no-argo", "- ../../components/no-argo"),
    )
    replace(
        copy / "job/dask-job.yaml",
        ("value: timesformer-scroll5", "value: demo"),
        ("s3://my-bucket/segment", "s3://scrolls/seg"),
        ('value: "17"', 'value: "0"'),
        ('value: "43"', 'value: "26"'),
        ("replicas: 4", "replicas: 2"),
    )
    world.call("kubectl", "apply", "--validate=false", "-k", copy)
    kubeconfig(world.folder / "user.kubeconfig", "inkdask:inkdask", "inkdask")
    literals = [f"--from-literal={name}={STORAGE[name]}" for name in SECRET]
    made = ["create", "secret", "generic", "inkdask", "--namespace", "inkdask", *literals]
    secret = world.folder / "secret.yaml"  # because `kubectl create` would send protobuf
    secret.write_text(world.call("kubectl", *made, "--dry-run=client", "-o", "yaml"))
    world.call("kubectl", "apply", "--validate=false", "-f", secret)


@pytest.fixture(scope="module")
def plain(world):
    """The picture of a job on one machine."""
    job = world.start_job(CLUSTER="threads", OUTPUT_PATH="s3://scrolls/plain")
    assert job.wait(300) == 0, job.told()
    return world.picture(job.said())


@pytest.mark.slow
def test_job_survives_a_lost_worker_and_leaves_no_cluster(world, plain):
    job = world.start_job(ZARR_OUTPUT_DIR="s3://scrolls/survives", OUTPUT_PATH="s3://scrolls/one")
    world.wait(lambda: re.search(r"ink: \d", job.told()) or job.poll() is not None)
    assert job.poll() is None, job.told()
    workers = [
        pod["metadata"]["name"]
        for pod in world.get("pods")
        if re.match(r"inkdask-\w{8}-default-worker", pod["metadata"]["name"])
    ]
    assert len(workers) == 2
    world.call("kubectl", "delete", "pod", "--namespace", "inkdask", "--wait=false", workers[0])
    assert job.wait(300) == 0, job.told() + world.logs()
    assert world.clusters() == []
    np.testing.assert_array_equal(world.picture(job.said()), plain)
    assert (world.folder / "result.txt").read_text() == job.said().strip()
    assert "Kubernetes cluster inkdask-" in job.told()
    assert STORAGE["AWS_SECRET_ACCESS_KEY"] not in job.told() + world.logs()


@pytest.mark.slow
def test_interrupted_job_leaves_no_cluster(world):
    job = world.start_job(ZARR_OUTPUT_DIR="s3://scrolls/stopped", OUTPUT_PATH="s3://scrolls/two")
    world.wait(lambda: re.search(r"ink: \d", job.told()) or job.poll() is not None)
    assert job.poll() is None, job.told()
    job.send_signal(signal.SIGINT)
    assert job.wait(240) == 130
    assert world.clusters() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_job_that_waits_for_gpus_says_so_and_leaves_no_cluster(world, number):
    job = world.start_job(CLUSTER_SPEC=GPU_SPEC, CLUSTER_IMAGE="inkdask:test")
    expected = "2 workers pending (0/1 nodes are available: 1 Insufficient nvidia.com/gpu)"
    world.wait(lambda: expected in job.told() or job.poll() is not None)
    assert job.poll() is None, job.told()
    job.send_signal(number)
    assert job.wait(240) == 128 + number
    assert world.clusters() == []


@pytest.mark.slow
def test_standing_cluster_gets_workers_when_there_is_work(world, plain):
    address = "tcp://inkdask-scheduler.inkdask:8786"
    places = {"ZARR_OUTPUT_DIR": "s3://scrolls/standing", "OUTPUT_PATH": "s3://scrolls/three"}
    job = world.start_job(CLUSTER=address, **places)
    assert job.wait(300) == 0, job.told() + world.logs()
    np.testing.assert_array_equal(world.picture(job.said()), plain)
    assert list(world.folder.glob("pods/inkdask-inkdask-default-worker-*"))


@pytest.mark.slow
def test_job_names_missing_image(world):
    patience = "import inkdask.clusters.pods; inkdask.clusters.pods.PATIENCE = 3"
    job = world.start_job(patience, CLUSTER_IMAGE="inkdask:lost")
    assert job.wait(240) != 0
    sentence = "does not get the scheduler started in namespace inkdask: ImagePullBackOff: no image"
    assert sentence in job.told()
    assert world.clusters() == []


@pytest.mark.slow
def test_account_may_do_no_more_than_its_role_says(world):
    code = "import kr8s; print(list(kr8s.get('secrets', namespace='inkdask')))"
    user = str(world.folder / "user.kubeconfig")
    refused = world.start(sys.executable, "-c", code, KUBECONFIG=user)
    assert refused.wait(120) != 0
    assert "secrets is forbidden" in refused.told()
    job = world.start_job(CLUSTER_NAMESPACE="default")
    assert job.wait(240) != 0
    assert "Kubernetes refuses: daskclusters is forbidden" in job.told()


@pytest.fixture
def dask_job(world, tmp_path):
    """Apply the DaskJob with changes to its text, wait until it ends, and return status and log."""

    def run(*changes):
        folder = shutil.copytree(world.folder / "cluster", tmp_path / "cluster")
        replace(folder / "job/dask-job.yaml", *changes)
        world.call("kubectl", "apply", "--validate=false", "-k", folder / "job")

        def ended():
            [job] = world.get("daskjobs")
            status = job.get("status", {}).get("jobStatus")
            return status if status in ("Successful", "Failed") else None

        status = world.wait(ended)
        log = world.call("kubectl", "logs", "--namespace", "inkdask", "read-ink-runner")
        # The operator removes the cluster; the job keeps its status until it is deleted.
        world.wait(lambda: world.clusters() == ["DaskJob/read-ink", "Pod/read-ink-runner"])
        return status, log

    yield run
    world.call("kubectl", "delete", "daskjob", "--namespace", "inkdask", "read-ink")
    world.wait(lambda: world.clusters() == [])


@pytest.mark.slow
def test_dask_job_makes_the_picture(world, plain, dask_job):
    status, log = dask_job()
    assert status == "Successful", log
    np.testing.assert_array_equal(world.picture(log.splitlines()[-1]), plain)
    schedulers = world.folder.glob("pods/inkdask-read-ink-scheduler-*/log")
    assert any("Receive client connection" in log.read_text() for log in schedulers)


@pytest.mark.slow
def test_dask_job_that_fails_says_why(dask_job):
    status, log = dask_job(('value: "26"', 'value: "25"'))
    assert status == "Failed", log
    assert log.splitlines()[-1].startswith("inkdask: Channel mismatch: 25 layers are given")
