"""The objects over HTTP, as kubectl, kr8s and kopf expect them."""

import asyncio
import copy
import json

import jsonpatch
from aiohttp import web

from tests.kubernetes.objects import (
    RESOURCES,
    ROLE_BINDINGS,
    ROLES,
    RefusedError,
    at,
    merged,
    selected,
)

# Tokens: kubectl sends none to a server without TLS; that of a service account is NAMESPACE:NAME.
ADMIN = ("", "admin")
GROUPS = sorted({(resource.group, resource.version) for resource in RESOURCES if resource.group})
VERBS = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]


def application(objects, read_log):
    """The API server. ``read_log(namespace, pod)`` gives what a pod wrote."""
    app = web.Application()
    handler = _Handler(objects, read_log)
    roots = {
        "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": _groups(),
    }
    for path, document in roots.items():
        for form in (path, f"{path}/"):
            app.router.add_get(form, lambda _, document=document: _json(document))
    app.router.add_route("*", "/api/{path:.*}", handler)
    app.router.add_route("*", "/apis/{path:.*}", handler)
    return app


async def _json(document, status=200):
    return web.json_response(document, status=status)


def _groups():
    listed = []
    for group, version in GROUPS:
        both = {"groupVersion": f"{group}/{version}", "version": version}
        listed.append({"name": group, "versions": [both], "preferredVersion": both})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}


def _resources(group, version):
    listed = []
    for resource in RESOURCES:
        if (resource.group, resource.version) == (group, version):
            one = {
                "name": resource.plural,
                "singularName": resource.kind.lower(),
                "kind": resource.kind,
                "namespaced": resource.namespaced,
                "verbs": VERBS,
            }
            listed.append(one)
            if resource.plural == "pods":
                listed.append({**one, "name": "pods/log", "verbs": ["get"]})
    name = f"{group}/{version}" if group else version
    return {
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": listed,
    }  # fmt: skip


class _Handler:
    def __init__(self, objects, read_log):
        self.objects, self.read_log = objects, read_log

    async def __call__(self, request):
        try:
            return await self.answer(request)
        except RefusedError as refusal:
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "code": refusal.code,
                "reason": refusal.reason,
                "message": str(refusal),
            }
            return await _json(status, refusal.code)

    async def answer(self, request):
        words = request.path.strip("/").split("/")
        group, words = ("", words[1:]) if words[0] == "api" else (words[1], words[2:])
        version, words = words[0], words[1:]
        if not words:
            return await _json(_resources(group, version))
        namespace = None
        if words[0] == "namespaces" and len(words) > 2:
            namespace, words = words[1], words[2:]
        resource = next(
            (r for r in RESOURCES if (r.group, r.version, r.plural) == (group, version, words[0])),
            None,
        )
        if resource is None:
            raise RefusedError(404, "NotFound", "the server could not find the requested resource")
        name, part = [*words[1:], None, None][:2]
        self.authorize(request, resource, namespace, name, part)
        if part == "log":
            return web.Response(text=self.read_log(namespace, name))
        if name is None:
            return await self.collection(request, resource, namespace)
        return await self.one(request, resource, self.objects.get(resource, namespace, name), part)

    async def collection(self, request, resource, namespace):
        if request.method == "POST":
            created = await self.objects.create(resource, namespace, await request.json())
            return await _json(created, 201)
        if request.method == "GET" and request.query.get("watch") in ("1", "true"):
            return await self.watch(request, resource, namespace)
        if request.method == "GET":
            listed = {
                "kind": f"{resource.kind}List",
                "apiVersion": resource.api_version,
                "metadata": {"resourceVersion": str(len(self.objects.events) + 1)},
                "items": self.objects.list(resource, namespace, *_selectors(request)),
            }
            return await _json(listed)
        raise RefusedError(405, "MethodNotAllowed", request.method)

    async def one(self, request, resource, old, part):
        if request.method == "GET":
            return await _json(old)
        body = await request.read()
        given = json.loads(body) if body else {}
        if request.method == "DELETE":
            foreground = given.get("propagationPolicy") == "Foreground"
            await self.objects.delete(resource, old, foreground)
            return await _json(old)
        if request.method == "PUT":
            new = given
        elif "json-patch" in request.content_type:
            try:
                new = jsonpatch.apply_patch(copy.deepcopy(old), given)
            except jsonpatch.JsonPatchException as error:
                raise RefusedError(422, "Invalid", str(error)) from None
        else:
            new = merged(copy.deepcopy(old), given)
        if request.method == "PATCH" and not at(given, "metadata", "resourceVersion"):
            new["metadata"].pop("resourceVersion", None)
        if part == "status":
            new = {**copy.deepcopy(old), "status": new.get("status", {})}
        return await _json(await self.objects.update(resource, old, new))

    async def watch(self, request, resource, namespace):
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        labels, fields = _selectors(request)

        async def send(what, document):
            line = json.dumps({"type": what, "object": document})
            await answer.write(line.encode() + b"\n")

        since = request.query.get("resourceVersion", "")
        position = len(self.objects.events)
        if since in ("", "0"):
            for document in self.objects.list(resource, namespace, labels, fields):
                await send("ADDED", document)
        else:
            position = max(0, int(since) - 1)
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", 300))):
                async for _, what, kind, document in self.objects.follow(position):
                    if (
                        kind == resource
                        and namespace in (None, document["metadata"].get("namespace"))
                        and selected(document, labels, fields)
                    ):
                        await send(what, document)
        except (TimeoutError, ConnectionResetError):  # seen enough, or gone
            pass
        return answer

    def authorize(self, request, resource, namespace, name, part):
        """Allow a service account what its roles allow, and the admin everything."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in ADMIN:
            return
        watched = request.query.get("watch") in ("1", "true")
        verb = {
            "GET": "watch" if watched else "get" if name else "list",
            "POST": "create",
            "PUT": "update",
            "PATCH": "patch",
            "DELETE": "delete",
        }[request.method]
        what = f"{resource.plural}/{part}" if part else resource.plural
        home, _, account = token.partition(":")
        for binding in self.objects.list(ROLE_BINDINGS, namespace or "-"):
            subjects = binding.get("subjects", [])
            if not any((s.get("namespace"), s["name"]) == (home, account) for s in subjects):
                continue
            role = self.objects.get(ROLES, namespace, binding["roleRef"]["name"])
            for rule in role["rules"]:
                if (
                    resource.group in rule["apiGroups"]
                    and what in rule["resources"]
                    and verb in rule["verbs"]
                ):
                    return
        message = f'{what} is forbidden: User "{token}" cannot {verb} it in "{namespace}"'
        raise RefusedError(403, "Forbidden", message)


def _selectors(request):
    return request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
