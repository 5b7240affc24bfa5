"""Manifests of Kubernetes: render them as kubectl does, and check them against their schemas."""

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml
from hera.workflows import models as argo

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
DASK, ARGO = "kubernetes.dask.org/v1", "argoproj.io/v1alpha1"
KUBERNETES_VERSION = "1.33"


def render(folder):
    """Return the documents that ``kubectl apply -k FOLDER`` would send."""
    kubectl = Path(sys.executable).with_name("kubectl")
    text = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=True
    ).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def only(documents, kind, name=None):
    """Return the only document of a kind (and name)."""
    [found] = [
        document
        for document in documents
        if document["kind"] == kind and name in (None, document["metadata"]["name"])
    ]
    return found


def problems(document):
    """Return what the reader of a document would refuse or ignore, as sentences."""
    if document["apiVersion"] == DASK:
        found = _dask_problems(document)
    elif document["apiVersion"] == ARGO:
        found = _argo_problems(document)
    else:
        found = _builtin_problems(document)
    for pod in pod_specs(document):  # Dask and Argo leave parts of a pod to Kubernetes
        found += _builtin_problems(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        )
    return found


def pod_specs(document):
    """Return the specs of the pods that a document makes, each with its containers."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "DaskCluster":
        return [spec["scheduler"]["spec"], spec["worker"]["spec"]]
    if kind == "DaskJob":
        cluster = {"kind": "DaskCluster", "spec": spec["cluster"]["spec"]}
        return [*pod_specs(cluster), spec["job"]["spec"]]
    if kind == "WorkflowTemplate":
        keys = "securityContext", "volumes", "nodeSelector", "serviceAccountName"
        shared = {key: spec[key] for key in keys if key in spec}
        return [
            {
                **shared,
                **{key: step[key] for key in ("tolerations", "nodeSelector") if key in step},
                "containers": [{"name": "main", **step["container"]}],
            }
            for step in spec["templates"]
            if "container" in step
        ]
    return []


def _builtin_problems(document):
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{document['kind']}: {error.message}"]
    return []


def _argo_problems(document):
    model = getattr(argo, document["kind"]).model_validate(document)
    known = model.model_dump(by_alias=True, exclude_none=True, mode="json")
    return [f"{document['kind']}: Argo does not know {path}" for path in _lost(document, known)]


def _lost(given, known, path=""):
    """Yield the paths of keys that a round trip through the models loses."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(known, dict) or key not in known:
                yield f"{path}/{key}"
            else:
                yield from _lost(value, known[key], f"{path}/{key}")
    elif isinstance(given, list):
        known = known if isinstance(known, list) else []
        for index, value in enumerate(given):
            yield from _lost(value, known[index] if index < len(known) else None, f"{path}/{index}")


def _dask_problems(document):
    validator = jsonschema.Draft202012Validator(dask_schemas()[document["kind"]])
    return [
        f"{document['kind']}/{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in validator.iter_errors(document)
    ]


@cache
def dask_definitions():
    """Return the custom resource definitions of the operator."""
    package = importlib.util.find_spec("dask_kubernetes").submodule_search_locations[0]
    folder = Path(package) / "operator/deployment/helm/dask-kubernetes-operator/crds"
    return [yaml.load(file.read_text(), yaml.CSafeLoader) for file in sorted(folder.glob("*.yaml"))]


@cache
def dask_schemas():
    """Return a JSON schema for each kind that refuses unknown keys."""
    schemas = {}
    for definition in dask_definitions():
        schema = _strict(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        schema["properties"].update(
            apiVersion={"const": DASK}, kind={"type": "string"}, metadata={"type": "object"}
        )
        schemas[definition["spec"]["names"]["kind"]] = schema
    return schemas


def _strict(schema):
    """Turn a structural schema of Kubernetes into a JSON schema that refuses unknown keys."""
    strict = {}
    for key, value in schema.items():
        if key == "properties":
            strict[key] = {name: _strict(part) for name, part in value.items()}
        elif isinstance(value, dict):
            strict[key] = _strict(value)
        elif isinstance(value, list):
            strict[key] = [_strict(part) if isinstance(part, dict) else part for part in value]
        else:
            strict[key] = value
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in strict and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
