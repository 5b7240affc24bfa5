"""The component ``tls`` of the manifests, with Dask's own programs in the place of pods."""

import os
import re
import shutil
import subprocess

import dask
import distributed  # noqa: F401  whose settings must be there before some are set
import pytest

from inkdask.clusters import connection
from inkdask.clusters.kubernetes import cluster_manifest
from inkdask.errors import InkdaskError, SettingsError
from inkdask.settings import Settings
from tests.conftest import free_port
from tests.manifests import CLUSTER, only, render
from tests.test_clusters import self_signed


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The manifests of a DaskJob, with the lines for TLS and for CPUs that the comments name."""
    folder = tmp_path_factory.mktemp("manifests") / "cluster"
    shutil.copytree(CLUSTER, folder)
    site = folder / "overlays/site/kustomization.yaml"
    site.write_text(re.sub(r"# (- ../../components/(?:tls|cpu)) ", r"\1 ", site.read_text()))
    job = folder / "job/kustomization.yaml"
    job.write_text(job.read_text().replace("# - tls ", "- tls "))
    return render(folder / "job")


@pytest.fixture
def start(documents, tmp_path):
    """Start the program of a container, with its environment; the Secret is a folder here."""
    certificate, key = self_signed(tmp_path)
    for file, source in (("ca.crt", certificate), ("tls.crt", certificate), ("tls.key", key)):
        shutil.copy(source, tmp_path / file)
    started = []

    def begin(pod, port):
        process = subprocess.Popen(
            [word.replace("8786", str(port)) for word in words(pod)],
            env={"PATH": os.environ["PATH"], **environment(documents, pod, tmp_path, port)},
        )
        started.append(process)

    yield begin
    for process in started:
        process.kill()
        process.wait()


def words(pod):
    container = pod["containers"][0]
    filled = {"$(DASK_WORKER_NAME)": "worker", ":8787": ":0", ":8788": ":0"}
    return [filled.get(word, word) for word in [*container["command"], *container["args"]]]


def environment(documents, pod, folder, port):
    """Environment of a pod of the cluster ``read-ink``, as Kubernetes and the operator make it."""
    container, found = pod["containers"][0], {}
    for source in container["envFrom"]:
        if source.get("configMapRef", {}).get("name") == "inkdask-tls":
            found |= only(documents, "ConfigMap", "inkdask-tls")["data"]
    for variable in container.get("env", []):
        value = variable.get("value")
        if value is None:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            value = {"metadata.labels['dask.org/cluster-name']": "read-ink"}[path]
        value = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        found[variable["name"]] = value.replace("read-ink-scheduler:8786", f"127.0.0.1:{port}")
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "tls"]
    assert {v["secret"]["secretName"] for v in pod["volumes"] if v["name"] == "tls"} == {
        "inkdask-tls"
    }
    inside = mount["mountPath"] + "/"
    return {name: re.sub(f"^{inside}", f"{folder}/", value) for name, value in found.items()}


@pytest.mark.slow
def test_pods_of_a_job_connect_by_tls_and_refuse_everybody_else(documents, start, tmp_path):
    spec, port = only(documents, "DaskJob")["spec"], free_port()
    cluster = spec["cluster"]["spec"]
    start(cluster["scheduler"]["spec"], port)
    start(cluster["worker"]["spec"], port)
    variables = environment(documents, spec["job"]["spec"], tmp_path, port)
    address = variables["DASK_SCHEDULER_ADDRESS"]
    assert address == f"tls://127.0.0.1:{port}"
    config = {  # flat, because a nested one replaces the other settings of Dask
        name.removeprefix("DASK_").lower().replace("__", ".").replace("_", "-"): value
        for name, value in variables.items()
        if name.startswith("DASK_DISTRIBUTED__COMM__TLS")
    }
    with dask.config.set(config):
        settings = Settings.of(cluster=address)
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "60s"}),
            connection.connect(settings) as client,
        ):
            assert client.submit(sum, (1, 2)).result(60) == 3
            [worker] = client.scheduler_info()["workers"]
            assert worker.startswith("tls://")
    for refused in (address, address.replace("tls", "tcp")):
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            pytest.raises(InkdaskError, match="cannot be used"),
            connection.connect(Settings.of(cluster=refused)),
        ):
            pass


def test_cluster_of_one_command_refuses_the_component(documents):
    standing = only(documents, "DaskCluster")
    with pytest.raises(SettingsError, match="--cluster kubernetes cannot .* the component tls"):
        cluster_manifest(Settings.of(), standing)
