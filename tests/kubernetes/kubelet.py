"""Deployments, and the node that runs their pods as processes with networks of their own."""

import asyncio
import base64
import contextlib
import copy
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import aiohttp

from tests.kubernetes.objects import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    KUBELET,
    PODS,
    SECRETS,
    SERVICES,
    RefusedError,
    now,
)

IMAGE = "inkdask:test"  # the only image of this node: what is installed here
GATEWAY = "10.9.0.1"
LACKING = "nvidia.com/gpu"
GRACE = 10  # seconds between SIGTERM and SIGKILL


class Kubelet:
    """Start and end processes as the objects say."""

    def __init__(self, objects, folder, hosts):
        self.objects, self.folder, self.hosts = objects, Path(folder), Path(hosts)
        self.processes, self.addresses, self.tasks = {}, {}, set()

    async def follow(self):
        """React to every event, in order, forever."""
        async for _, what, resource, document in self.objects.follow(0):
            place = document["metadata"].get("namespace"), document["metadata"]["name"]
            if resource == PODS and what == "ADDED":
                self.start(self.run(place, document))
            if resource == PODS and document["metadata"].get("deletionTimestamp"):
                self.start(self.end(place))
            if resource in (PODS, DEPLOYMENTS):
                self.start(self.replicate())
            if resource in (PODS, SERVICES):
                self.name_services()

    def start(self, work):
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def replicate(self):
        """Give each deployment as many pods as it wants."""
        for deployment in self.objects.list(DEPLOYMENTS):
            metadata, spec = deployment["metadata"], deployment["spec"]
            if metadata.get("deletionTimestamp"):
                continue
            pods = [
                pod
                for pod in self.objects.list(PODS, metadata["namespace"])
                if any(
                    o["uid"] == metadata["uid"] for o in pod["metadata"].get("ownerReferences", [])
                )
                and not pod["metadata"].get("deletionTimestamp")
            ]
            owner = {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": metadata["name"],
                "uid": metadata["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
            for _ in range(spec["replicas"] - len(pods)):
                pod = copy.deepcopy(spec["template"])
                pod["metadata"].pop("name", None)
                pod["metadata"]["generateName"] = f"{metadata['name']}-"
                pod["metadata"]["ownerReferences"] = [owner]
                await self.objects.create(PODS, metadata["namespace"], pod)

    async def run(self, place, pod):
        """Run the container of a pod until the pod is deleted, or has done its work."""
        container = pod["spec"]["containers"][0]
        if LACKING in container.get("resources", {}).get("limits", {}):
            message = f"0/1 nodes are available: 1 Insufficient {LACKING}."
            unscheduled = {"type": "PodScheduled", "status": "False", "message": message}
            return await self.report(place, "Pending", None, conditions=[unscheduled])
        if container["image"] != IMAGE:
            waiting = {"reason": "ImagePullBackOff", "message": f"no image {container['image']}"}
            return await self.report(place, "Pending", {"waiting": waiting})
        self.addresses[place] = (
            f"10.9.{1 + len(self.addresses) // 200}.{2 + len(self.addresses) % 200}"
        )
        restarts = 0
        while self.is_wanted(place):
            process = await self.spawn(place, container)
            await self.report(place, "Running", {"running": {"startedAt": now()}})
            probe = asyncio.create_task(self.probe(place, container))
            code = await process.wait()
            probe.cancel()
            await self.unplug(place)
            terminated = {"terminated": {"exitCode": code, "finishedAt": now()}}
            if pod["spec"].get("restartPolicy", "Always") == "Never":
                await self.report(place, "Succeeded" if code == 0 else "Failed", terminated)
                return None
            restarts += 1
            waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
            await self.report(place, "Running", waiting, restarts=restarts)
            await asyncio.sleep(min(2**restarts, 20))
        return None

    def is_wanted(self, place):
        pod = self.objects.all.get((PODS, *place))
        return pod is not None and not pod["metadata"].get("deletionTimestamp")

    async def spawn(self, place, container):
        """Start a process in a network of its own, and connect that at the pod's address."""
        folder = self.folder / "-".join(place)
        folder.mkdir(parents=True, exist_ok=True)
        environment = self.environment(place, container, folder)
        words = [*container["command"], *container.get("args", [])]
        words = [re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), w) for w in words]
        words[0] = shutil.which(words[0], path=environment["PATH"])
        # The process waits for its network before it becomes the container's command.
        plugged = folder / "plugged"
        plugged.unlink(missing_ok=True)
        script = f'until [ -e "{plugged}" ]; do sleep 0.05; done; exec "$@"'
        with (folder / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                "unshare", "--net", "sh", "-c", script, "sh", *words,
                env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder,
            )  # fmt: skip
        self.processes[place] = process
        await asyncio.sleep(0.1)  # unshare has called unshare
        for command in network(process.pid, f"pod{process.pid}", self.addresses[place]):
            await run(*command)
        plugged.touch()
        return process

    async def unplug(self, place):
        process = self.processes.pop(place)
        await run("ip", "link", "del", f"pod{process.pid}", check=False)

    def environment(self, place, container, folder):
        """What Kubernetes gives a container, and nothing of this process but its programs."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "RESULT_FILE": str(folder / "result_s3_url.txt"),  # as if /tmp were the pod's own
        }
        for source in container.get("envFrom", []):
            for key, resource in (("configMapRef", CONFIG_MAPS), ("secretRef", SECRETS)):
                if key in source:
                    environment.update(self.values(resource, place[0], source[key]))
        environment.update({e["name"]: e.get("value", "") for e in container.get("env") or []})
        return environment

    def values(self, resource, namespace, reference):
        try:
            found = self.objects.get(resource, namespace, reference["name"])
        except RefusedError:
            assert reference["optional"], reference
            return {}
        data = found.get("data", {})
        if resource == SECRETS:
            return {key: base64.b64decode(value).decode() for key, value in data.items()}
        return data

    async def probe(self, place, container):
        """Say that a pod is ready, when its probe says so."""
        if probe := container.get("readinessProbe"):
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            port, path = ports[probe["httpGet"]["port"]], probe["httpGet"]["path"]
            url = f"http://{self.addresses[place]}:{port}{path}"
            async with aiohttp.ClientSession() as session:
                while True:
                    with contextlib.suppress(aiohttp.ClientError, OSError):
                        async with session.get(url) as answer:
                            if answer.status == 200:
                                break
                    await asyncio.sleep(0.5)
        await self.report(place, "Running", {"running": {"startedAt": now()}}, ready=True)

    async def report(self, place, phase, state, *, ready=False, restarts=0, conditions=()):
        """Set the status of a pod."""
        pod = self.objects.all.get((PODS, *place))
        if pod is None:
            return
        new = copy.deepcopy(pod)
        container = new["spec"]["containers"][0]
        shown = [
            {"type": kind, "status": str(ready)} for kind in ("Ready", "ContainersReady")
        ]  # fmt: skip
        new["status"] = {
            "phase": phase,
            "podIP": self.addresses.get(place, ""),
            "startTime": now(),
            "conditions": [*shown, *conditions],
        }
        if state is not None:
            status = {"name": container["name"], "image": container["image"], "state": state}
            new["status"]["containerStatuses"] = [
                {**status, "ready": ready, "restartCount": restarts}
            ]
        await self.objects.update(PODS, pod, new)

    async def end(self, place):
        """End a pod that is deleted, and let it go."""
        process = self.processes.get(place)
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE):
                        await process.wait()
                os.killpg(process.pid, signal.SIGKILL)
        await self.objects.release(PODS, *place, KUBELET)

    def name_services(self):
        """Let the names of services lead to the pods that they select, or where nobody answers."""
        lines = ["127.0.0.1 localhost"]
        for service in self.objects.list(SERVICES):
            name, namespace = (service["metadata"][key] for key in ("name", "namespace"))
            labels = ",".join(f"{k}={v}" for k, v in service["spec"]["selector"].items())
            pods = self.objects.list(PODS, namespace, labels)
            addresses = [self.addresses.get((namespace, pod["metadata"]["name"])) for pod in pods]
            address = next(filter(None, addresses), "127.0.0.1")
            lines.append(f"{address} {name}.{namespace} {name}.{namespace}.svc.cluster.local")
        text = "\n".join([*lines, ""])
        if self.hosts.read_text() != text:
            self.hosts.write_text(text)

    def read_log(self, namespace, name):
        file = self.folder / f"{namespace}-{name}" / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def kill_all(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def network(pid, link, address):
    """Commands that connect the network of a process to the node's."""
    inside = ["nsenter", "--target", str(pid), "--net"]
    return [
        ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid)],
        ["ip", "link", "set", link, "master", "node", "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
        [*inside, "ip", "address", "add", f"{address}/16", "dev", "eth0"],
        [*inside, "ip", "link", "set", "eth0", "up"],
        [*inside, "ip", "route", "add", "default", "via", GATEWAY],
    ]


async def run(*command, check=True):
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if check and process.returncode:
        raise RuntimeError(f"{command}: {said.decode()}")
