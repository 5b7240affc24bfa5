"""The objects of a Kubernetes cluster: stored, watched, checked, and removed with their owners."""

import asyncio
import copy
import datetime
import uuid
from dataclasses import dataclass

from tests.manifests import DASK, dask_definitions, problems

FOREGROUND = "foregroundDeletion"
KUBELET = "tests/kubelet"  # keeps a pod until its process has ended


@dataclass(frozen=True)
class Resource:
    """A kind of objects, as its URL names it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self):
        return f"{self.group}/{self.version}" if self.group else self.version


PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
SECRETS = Resource("", "v1", "secrets", "Secret")
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
DEFINITIONS = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False
)
RESOURCES = [
    PODS,
    SERVICES,
    CONFIG_MAPS,
    SECRETS,
    NAMESPACES,
    DEPLOYMENTS,
    ROLES,
    ROLE_BINDINGS,
    DEFINITIONS,
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "events", "Event"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    *(
        Resource(
            definition["spec"]["group"],
            definition["spec"]["versions"][0]["name"],
            definition["spec"]["names"]["plural"],
            definition["spec"]["names"]["kind"],
        )
        for definition in dask_definitions()
    ),
]


class RefusedError(Exception):
    """Error that the API answers."""

    def __init__(self, code, reason, message):
        super().__init__(message)
        self.code, self.reason = code, reason


def now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def at(document, *path):
    """Return the value at a path of keys in a document, or None."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def merged(old, patch):
    """Apply a JSON merge patch."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merged(new.get(key), value)
    return new


def selected(document, labels="", fields=""):
    """Whether a document matches a label selector and a field selector."""
    carried = document["metadata"].get("labels") or {}
    for term in filter(None, labels.split(",")):
        if "!=" in term:
            key, value = term.split("!=", 1)
            if carried.get(key) == value:
                return False
        elif "=" in term:
            key, value = term.replace("==", "=").split("=", 1)
            if carried.get(key) != value:
                return False
        elif term not in carried:
            return False
    for term in filter(None, fields.split(",")):
        key, value = term.replace("==", "=").split("=", 1)
        if str(at(document, *key.split("."))) != value:
            return False
    return True


class Objects:
    """All objects, and all events on them."""

    def __init__(self):
        self.all = {}  # (resource, namespace, name) -> document
        self.events = []  # (version, type, resource, document)
        self.changed = asyncio.Condition()

    def list(self, resource, namespace=None, labels="", fields=""):
        return [
            document
            for (kind, where, _), document in self.all.items()
            if kind == resource
            and namespace in (None, where)
            and selected(document, labels, fields)
        ]

    def get(self, resource, namespace, name):
        try:
            return self.all[resource, namespace if resource.namespaced else None, name]
        except KeyError:
            raise RefusedError(404, "NotFound", f'{resource.plural} "{name}" not found') from None

    async def create(self, resource, namespace, document):
        metadata = document.setdefault("metadata", {})
        if "name" not in metadata:
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        namespace = (namespace or metadata.get("namespace")) if resource.namespaced else None
        if resource.namespaced:
            self.get(NAMESPACES, None, namespace)
            metadata["namespace"] = namespace
        if (resource, namespace, metadata["name"]) in self.all:
            name = metadata["name"]
            raise RefusedError(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        document.update(apiVersion=resource.api_version, kind=resource.kind)
        self._check(document)
        metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
        if resource == PODS:
            metadata["finalizers"] = [*metadata.get("finalizers", []), KUBELET]
            document["status"] = {"phase": "Pending"}
        if resource == SERVICES:
            document["status"] = {"loadBalancer": {}}
        self.all[resource, namespace, metadata["name"]] = document
        await self._happened("ADDED", resource, document)
        await self._collect()
        return document

    async def update(self, resource, old, new):
        """Replace an object, unless it has changed since it was read."""
        seen = at(new, "metadata", "resourceVersion")
        if seen and seen != old["metadata"]["resourceVersion"]:
            raise RefusedError(409, "Conflict", "the object has been modified")
        for key in ("uid", "creationTimestamp", "name", "namespace", "deletionTimestamp"):
            if key in old["metadata"]:
                new["metadata"][key] = old["metadata"][key]
        self._check(new)
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        new["metadata"]["generation"] = old["metadata"]["generation"] + (
            new.get("spec") != old.get("spec")
        )
        if new != old:
            place = resource, old["metadata"].get("namespace"), old["metadata"]["name"]
            self.all[place] = new
            await self._happened("MODIFIED", resource, new)
            await self._collect()
        return new

    async def delete(self, resource, document, foreground=False):
        metadata = document["metadata"]
        new = copy.deepcopy(document)
        if foreground and FOREGROUND not in metadata.get("finalizers", []):
            new["metadata"]["finalizers"] = [*metadata.get("finalizers", []), FOREGROUND]
        if not metadata.get("deletionTimestamp"):
            new["metadata"]["deletionTimestamp"] = now()
        if new != document:
            place = resource, metadata.get("namespace"), metadata["name"]
            self.all[place] = new
            await self._happened("MODIFIED", resource, new)
        await self._collect()

    async def release(self, resource, namespace, name, finalizer):
        """Remove a finalizer of an object, and the object if it was the last."""
        document = self.all.get((resource, namespace, name))
        if document and finalizer in document["metadata"].get("finalizers", []):
            new = copy.deepcopy(document)
            new["metadata"]["finalizers"].remove(finalizer)
            await self.update(resource, document, new)

    async def _collect(self):
        """Remove objects without finalizers, and those whose owner is gone."""
        again = True
        while again:
            again = False
            alive = {document["metadata"]["uid"] for document in self.all.values()}
            for place, document in list(self.all.items()):
                metadata = document["metadata"]
                owners = {owner["uid"] for owner in metadata.get("ownerReferences", [])}
                if owners and not owners & alive and not metadata.get("deletionTimestamp"):
                    metadata["deletionTimestamp"] = now()
                    await self._happened("MODIFIED", place[0], document)
                    again = True
                if not metadata.get("deletionTimestamp"):
                    continue
                if FOREGROUND in metadata.get("finalizers", []):
                    again |= await self._collect_owned(document)
                if not metadata.get("finalizers") and self.all.pop(place, None):
                    await self._happened("DELETED", place[0], document)
                    again = True

    async def _collect_owned(self, owner):
        """Remove the objects that an object owns, before itself."""
        changed, uid = False, owner["metadata"]["uid"]
        owned = [
            (place, document)
            for place, document in self.all.items()
            if any(o["uid"] == uid for o in document["metadata"].get("ownerReferences", []))
        ]
        for place, document in owned:
            metadata = document["metadata"]
            if not metadata.get("deletionTimestamp"):
                metadata["deletionTimestamp"] = now()
                metadata["finalizers"] = [*metadata.get("finalizers", []), FOREGROUND]
                await self._happened("MODIFIED", place[0], document)
                changed = True
        if not owned:
            owner["metadata"]["finalizers"].remove(FOREGROUND)
            changed = True
        return changed

    def _check(self, document):
        found = problems(document) if document["apiVersion"] == DASK else []
        if found:
            raise RefusedError(422, "Invalid", f"{document['kind']} is invalid: {found[0]}")

    async def follow(self, position):
        """Yield all events from a position on, forever."""
        while True:
            while position < len(self.events):
                yield self.events[position]
                position += 1
            async with self.changed:
                await self.changed.wait_for(lambda seen=position: seen < len(self.events))

    async def _happened(self, what, resource, document):
        version = len(self.events) + 2
        document["metadata"]["resourceVersion"] = str(version)
        self.events.append((version, what, resource, copy.deepcopy(document)))
        async with self.changed:
            self.changed.notify_all()
