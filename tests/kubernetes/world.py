"""``unshare --net --mount python -m tests.kubernetes.world FOLDER`` starts a small Kubernetes.

It has an API server, a node, the real Dask operator and an S3 server, in a network without a way
out. It prints ``ready``, and ends with SIGTERM.
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import yaml
from aiohttp import web

from tests.kubernetes.api import ADMIN, application
from tests.kubernetes.kubelet import GATEWAY, Kubelet
from tests.kubernetes.objects import DEFINITIONS, NAMESPACES, Objects
from tests.manifests import dask_definitions

API_PORT, S3_PORT = 18080, 15000
S3 = f"http://{GATEWAY}:{S3_PORT}"


def kubeconfig(file, token, namespace):
    """Write the file by which clients find the API server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://{GATEWAY}:{API_PORT}"}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [
            {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}
        ],
        "current-context": "x",
    }
    file.write_text(yaml.safe_dump(config))
    return file


def lay_network(folder):
    """Make a bridge for the pods, and give this world its own hosts file and resolver."""
    hosts, resolver = folder / "hosts", folder / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n")
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "link", "add", "node", "type", "bridge"],
        ["ip", "address", "add", f"{GATEWAY}/16", "dev", "node"],
        ["ip", "link", "set", "node", "up"],
        ["mount", "--bind", hosts, "/etc/hosts"],
        ["mount", "--bind", resolver, "/etc/resolv.conf"],
    ):
        subprocess.run(command, check=True)
    return Path("/etc/hosts")


async def answers(url):
    """Wait until a URL answers."""
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


async def main(folder):
    hosts = lay_network(folder)
    objects = Objects()
    kubelet = Kubelet(objects, folder / "pods", hosts)
    for name in ("default", "inkdask"):
        await objects.create(NAMESPACES, None, {"metadata": {"name": name}})
    for definition in dask_definitions():
        await objects.create(DEFINITIONS, None, definition)
    server = web.AppRunner(application(objects, kubelet.read_log), access_log=None)
    await server.setup()
    await web.TCPSite(server, "0.0.0.0", API_PORT).start()

    environment = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig(folder / "operator.kubeconfig", ADMIN[1], "default")),
        "HOME": str(folder),
    }
    programs = {
        "s3": [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)],
        "operator": [
            Path(sys.executable).with_name("kopf"), "run", "--all-namespaces", "--standalone",
            "-m", "dask_kubernetes.operator.controller",
            "--liveness", f"http://{GATEWAY}:18081/healthz",
        ],
    }  # fmt: skip
    started = []
    for name, command in programs.items():
        with (folder / f"{name}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    following = asyncio.create_task(kubelet.follow())
    try:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with asyncio.timeout(120):
            await answers(S3)
            await answers(f"http://{GATEWAY}:18081/healthz")
        print("ready", flush=True)
        await stop.wait()
    finally:
        following.cancel()
        kubelet.kill_all()
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
