"""The manifests under cluster/: they render, and are valid for all that reads them."""

import copy
import importlib.metadata
import re
import shutil
from functools import cache
from types import SimpleNamespace

import click
import dask.array as da
import numpy as np
import pytest
import yaml
from dask_kubernetes.operator.controller import controller

from inkdask.cli import inkdask_
from inkdask.clusters.cuda import THREADS
from inkdask.memory import IMPORTS, expected_memory
from inkdask.reading.images import DECODING_BYTES
from inkdask.tiling import Tiling
from tests.manifests import CLUSTER, only, pod_specs, problems, render

COMPONENTS = sorted(folder.name for folder in (CLUSTER / "components").iterdir())


def with_components(folder, *components):
    """Copy the manifests, and add components to the overlay as its README says."""
    shutil.copytree(CLUSTER, folder)
    for name in components:
        edit_site(folder, (f"# - ../../components/{name} #", f"- ../../components/{name} #"))
    return folder


def edit_site(folder, *changes):
    """Edit the overlay, the only file that an admin edits."""
    site = folder / "overlays/site/kustomization.yaml"
    text = site.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    site.write_text(text)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Render the overlay, or a ``part`` of the manifests, with a component; once for each."""

    @cache
    def render_with(component="", part=""):
        folder = tmp_path_factory.mktemp("cluster") / "cluster"
        return render(with_components(folder, *filter(None, [component])) / part)

    return render_with


@pytest.fixture
def site(rendered):
    return rendered()


@pytest.fixture
def job(rendered):
    return rendered(part="job")


@pytest.mark.parametrize("part", ["", "job"])
@pytest.mark.parametrize("component", ["", *COMPONENTS])
def test_manifests_are_valid_with_every_component(component, part, rendered):
    documents = rendered(component, part)
    assert [problem for document in documents for problem in problems(document)] == []


def test_schemas_refuse_wrong_documents(site):
    def broken(kind, change):
        document = copy.deepcopy(only(site, kind, "inkdask"))
        change(document)
        return problems(document)

    def worker(document):
        return document["spec"]["worker"]["spec"]["containers"][0]

    gpus = "nvidia.com/gpu"
    assert broken("DaskCluster", lambda d: d["spec"].update(workers=1))
    assert broken("DaskCluster", lambda d: worker(d)["resources"]["limits"].update({gpus: [1]}))
    assert broken("DaskCluster", lambda d: worker(d).update(comand=["dask"]))
    assert broken("DaskAutoscaler", lambda d: d["spec"].pop("minimum"))
    assert broken("Role", lambda d: d["rules"][0].update(verb=["get"]))
    assert broken("WorkflowTemplate", lambda d: d["spec"].update(entryPoint="x"))
    assert broken("WorkflowTemplate", lambda d: d["spec"]["volumes"][0].update(emptyDirs={}))


def test_overlay_sets_namespace_image_and_bucket(tmp_path):
    folder = with_components(tmp_path / "cluster")
    edit_site(
        folder,
        ("newName: registry.example.com/inkdask", "newName: here.example.org/ink"),
        ("newTag: 0.1.0", "newTag: v9"),
        ("namespace: inkdask", "namespace: papyri"),
        ("s3://my-bucket/", "s3://papyri/"),
    )
    documents = render(folder)
    images = {c["image"] for d in documents for pod in pod_specs(d) for c in pod["containers"]}
    assert images == {"here.example.org/ink:v9"}
    assert {document["metadata"]["namespace"] for document in documents} == {"papyri"}
    settings = only(documents, "ConfigMap")
    assert settings["data"]["ZARR_OUTPUT_DIR"].startswith("s3://papyri/")
    # The overlay keeps the names by which pods refer to the ConfigMap.
    assert settings["metadata"]["name"] == "inkdask"


def test_overlay_patch_sets_the_role_of_the_cloud_for_all_accounts(tmp_path):
    folder = with_components(tmp_path / "cluster")
    site = folder / "overlays/site/kustomization.yaml"
    head, tail = site.read_text().split("  # - target")
    patch, rest = tail.split("\n\n", 1)
    site.write_text(f"{head}  - target{patch.replace('  # ', '  ')}\n\n{rest}")
    documents = render(folder)
    used = {pod["serviceAccountName"] for document in documents for pod in pod_specs(document)}
    assert used == {"inkdask", "inkdask-argo"}
    for name in used:
        annotations = only(documents, "ServiceAccount", name)["metadata"]["annotations"]
        assert annotations["eks.amazonaws.com/role-arn"].endswith(":role/inkdask")


def containers(documents):
    for document in documents:
        for pod in pod_specs(document):
            for container in pod["containers"]:
                yield f"{document['kind']}/{document['metadata']['name']}", container


def parse(command, words):
    """Parse a command line as the installed program does, without running it."""
    context = command.make_context(words[0], list(words[1:]))
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def dask_command():
    """The ``dask`` program, with the sub-commands that are installed."""
    group = click.Group("dask")
    for entry in importlib.metadata.entry_points(group="dask_cli"):
        if entry.name != "kubernetes":
            group.add_command(entry.load(), entry.name)
    return group


PROGRAMS = {"dask": dask_command, "inkdask": lambda: inkdask_}


def test_commands_of_all_pods_parse(site, job, rendered):
    cpu = rendered("cpu")
    seen = set()
    for where, container in containers([*site, *job, *cpu]):
        words = [*container["command"], *container.get("args", [])]
        filled = [re.sub(r"\{\{.*?\}\}|\$\(\w+\)", "1", word) for word in words]
        context = parse(PROGRAMS[words[0]](), filled)
        seen.add(context.command_path)
        assert not context.args, (where, words)
    assert seen == {
        "dask scheduler", "dask worker", "dask cuda worker", "inkdask run", "inkdask check",
    }  # fmt: skip


def test_parse_refuses_unknown_commands():
    for words in (["dask", "workr"], ["dask", "scheduler", "--bokeh"], ["dask", "cuda", "wrker"]):
        with pytest.raises(click.UsageError):
            parse(dask_command(), words)


def test_pods_run_without_rights(site, job):
    for document in [*site, *job]:
        for pod in pod_specs(document):
            assert pod["securityContext"]["runAsNonRoot"]
            of_argo = document["kind"] == "WorkflowTemplate"
            assert pod["serviceAccountName"] == ("inkdask-argo" if of_argo else "inkdask")
            assert of_argo or pod["automountServiceAccountToken"] is False
            assert pod["nodeSelector"]["kubernetes.io/arch"] == "amd64"
            for container in pod["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"]
                assert not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/tmp"}
                requests = container["resources"]["requests"]
                assert requests.keys() == {"cpu", "memory", "ephemeral-storage"}


def test_accounts_may_do_what_their_pods_do(site):
    """Argo's container in each pod reports its results; a pod of Dask asks nothing."""
    assert only(site, "ServiceAccount", "inkdask")["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in only(site, "ServiceAccount", "inkdask-argo")
    for name in ("inkdask", "inkdask-argo"):
        [subject] = only(site, "RoleBinding", name)["subjects"]
        assert (subject["kind"], subject["name"]) == ("ServiceAccount", name)
        assert only(site, "RoleBinding", name)["roleRef"]["name"] == name
    report = {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"]}
    rules = only(site, "Role", "inkdask-argo")["rules"]
    assert rules == [report | {"verbs": ["create", "patch"]}]
    of_dask = only(site, "Role", "inkdask")["rules"]
    assert "argoproj.io" not in {group for rule in of_dask for group in rule["apiGroups"]}


def labels_of_pods(document):
    """Return the labels of the pods of a document, as the Dask operator and Argo make them."""
    if document["kind"] == "WorkflowTemplate":
        return [document["spec"]["podMetadata"]["labels"]]
    labels = controller._get_labels(SimpleNamespace(labels=document["metadata"]["labels"]))
    names = {"cluster_name": "x", "annotations": {}, "labels": labels}
    group = controller.build_default_worker_group_spec("x", {}, {}, labels)["metadata"]["labels"]
    pods = [
        controller.build_scheduler_deployment_spec(pod_spec={}, **names)["spec"]["template"],
        controller.build_worker_deployment_spec(
            "g", "n", uuid="u", pod_spec={"containers": []}, **names | {"labels": group}
        )["spec"]["template"],
    ]
    if document["kind"] == "DaskJob":
        pods.append(
            controller.build_job_pod_spec("x", namespace="n", spec={"containers": []}, **names)
        )
    return [pod["metadata"]["labels"] for pod in pods]


def test_network_policy_lets_only_pods_of_inkdask_and_the_operator_in(job):
    spec = only(job, "NetworkPolicy")["spec"]
    ours = spec["podSelector"]["matchLabels"]
    makers = [d for d in job if d["kind"] in ("DaskCluster", "DaskJob", "WorkflowTemplate")]
    assert len(makers) == 4
    for labels in (labels for document in makers for labels in labels_of_pods(document)):
        assert ours.items() <= labels.items()
    assert spec["policyTypes"] == ["Ingress"]
    among_us, operator = spec["ingress"]
    assert among_us == {"from": [{"podSelector": {"matchLabels": ours}}]}
    [where] = operator["from"]
    namespace = where["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert f"--namespace {namespace} " in (CLUSTER / "README.md").read_text()
    ports = only(job, "DaskCluster")["spec"]["scheduler"]["service"]["ports"]
    assert {p["port"] for p in operator["ports"]} == {p["port"] for p in ports}


def test_workflows_have_what_users_of_argo_rely_on(site, rendered):
    for document in (d for d in site if d["kind"] == "WorkflowTemplate"):
        for parameter in document["spec"]["arguments"]["parameters"]:
            assert "value" in parameter, parameter["name"]
        assert not {"archiveLogs", "podGC"} & document["spec"].keys()
        for template in document["spec"]["templates"]:
            if "container" in template:
                assert template["retryStrategy"]["backoff"].keys() >= {"duration", "maxDuration"}
    archived = [d["spec"] for d in rendered("archive-logs") if d["kind"] == "WorkflowTemplate"]
    assert len(archived) == 2
    for spec in archived:
        assert spec["archiveLogs"] is True
        assert spec["podGC"] == {"strategy": "OnPodSuccess"}


def test_cluster_without_argo_has_nothing_of_it(rendered):
    left = {(d["kind"], d["metadata"]["name"]) for d in rendered("no-argo")}
    assert ("Role", "inkdask") in left
    assert not [one for one in left if "Workflow" in one[0] or "argo" in one[1]]


def test_cluster_of_a_dask_job_equals_the_standing_one(job):
    cluster, whole = only(job, "DaskCluster")["spec"], only(job, "DaskJob")
    inner = copy.deepcopy(whole["spec"]["cluster"]["spec"])
    selector = inner["scheduler"]["service"]["selector"]
    assert selector["dask.org/cluster-name"] == whole["metadata"]["name"]
    selector["dask.org/cluster-name"] = cluster["scheduler"]["service"]["selector"][
        "dask.org/cluster-name"
    ]
    assert inner["scheduler"] == cluster["scheduler"]
    assert inner["worker"]["spec"] == cluster["worker"]["spec"]


def test_gpus_are_requested_only_by_pods_that_infer(site, rendered):
    def on_gpus(documents):
        return [
            where
            for where, container in containers(documents)
            if "nvidia.com/gpu" in container["resources"]["limits"]
        ]

    assert on_gpus(site) == [
        "WorkflowTemplate/inkdask", "WorkflowTemplate/inkdask-parts", "DaskCluster/inkdask",
    ]  # fmt: skip
    assert on_gpus(rendered("cpu")) == []
    pods = [pod for document in rendered("spot") for pod in pod_specs(document)]
    selected = [pod for pod in pods if "karpenter.sh/capacity-type" in pod["nodeSelector"]]
    assert len(selected) == 3
    assert {pod["nodeSelector"]["kubernetes.io/arch"] for pod in selected} == {"amd64"}
    for pod in selected:
        assert "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]


def test_gpu_pods_have_memory_for_large_jobs_and_a_compiler(site, rendered):
    layers, width, chunk, threads = 62, 40_000, 2048, THREADS
    volume = da.zeros((layers, width, width), chunks=(layers, 64, width), dtype=np.uint8)
    tiling = Tiling.of(volume.shape[1:], tile=256, stride=128, chunk=chunk)
    cuda, compiler, decoding = 3e9 - IMPORTS, 4 * 0.5e9, 2 * DECODING_BYTES
    needed = expected_memory(volume, tiling, threads) + cuda + compiler + decoding
    found = [container for _, container in containers(site) if "nvidia.com/gpu" in str(container)]
    assert len(found) == 3
    for container in found:
        memory = container["resources"]["limits"]["memory"]
        assert memory == container["resources"]["requests"]["memory"]
        assert needed < int(memory.removesuffix("Gi")) * 2**30
        environment = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        words = [*container["args"], "--nthreads", environment.get("DASK_NUM_WORKERS")]
        assert words[words.index("--nthreads") + 1] == str(threads)
    words = only(rendered("cpu"), "DaskCluster")["spec"]["worker"]["spec"]["containers"][0]["args"]
    assert words[words.index("--nthreads") + 1] == "4"


def test_all_pods_of_a_job_agree_on_the_size_of_chunks(site, job):
    """The default depends on the device, and some pods of a job have none."""
    assert only(site, "ConfigMap")["data"]["CHUNK_SIZE"] == "2048"
    programs = [c for _, c in containers([*site, *job]) if c["command"] == ["inkdask"]]
    assert len(programs) > 10
    for container in programs:
        assert {"configMapRef": {"name": "inkdask", "optional": True}} in container["envFrom"]
        assert "CHUNK_SIZE" not in {variable["name"] for variable in container["env"]}


def test_cache_outlives_pods_with_its_component(rendered):
    for part, pods in (("", 7), ("job", 8)):
        documents = rendered("cache", part)
        claim = only(documents, "PersistentVolumeClaim")["metadata"]["name"]
        kept = [
            container["name"]
            for document in documents
            for pod in pod_specs(document)
            if {"name": "cache", "persistentVolumeClaim": {"claimName": claim}} in pod["volumes"]
            for container in pod["containers"]
            if {"name": "cache", "mountPath": "/tmp/cache"} in container["volumeMounts"]
        ]
        assert len(kept) == pods


def test_workflows_take_the_same_parameters(site):
    one, parts = (
        {p["name"]: p.get("value") for p in only(site, "WorkflowTemplate", name)["spec"][
            "arguments"]["parameters"]}
        for name in ("inkdask", "inkdask-parts")
    )  # fmt: skip
    assert parts.pop("parts") == "4"
    assert one == parts


def test_kustomization_lists_every_file_of_the_base():
    base = CLUSTER / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(f.name for f in base.iterdir() if f.stem != "kustomization")
