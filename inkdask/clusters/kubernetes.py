"""A Dask cluster on Kubernetes, for the time of one job.

The operator of dask-kubernetes turns a `DaskCluster` manifest into pods. The manifest comes with
the package; ``kubectl apply -k cluster`` applies the same one. The cluster is removed however the
job ends. Should this process be killed, the operator removes the cluster after IDLE_TIMEOUT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rich.console import Console
from rich.text import Text

from inkdask import storage
from inkdask.clusters.pods import API, IDLE_TIMEOUT, Pods, object_of
from inkdask.errors import SettingsError, UnavailableError
from inkdask.progress import write
from inkdask.settings import Settings, env_name
from inkdask.specs import NO_MASK

if TYPE_CHECKING:
    from distributed import Client

MANIFEST = "dask-cluster.yaml"
STANDING = "inkdask"  # name of the cluster that the manifests make
MAX_WORKERS = 8


@contextmanager
def kubernetes(settings: Settings) -> Iterator[Client]:
    """Make a Dask cluster for the block, and remove it in any case.

    Outside the Kubernetes cluster, the scheduler's port is forwarded.

    Parameters
    ----------
    settings
        ``min_workers`` and ``max_workers`` bound the number of workers, which follows the work.
        ``cluster_namespace``, ``cluster_image`` and ``cluster_spec`` say where the pods run and
        what they are made of.

    Yields
    ------
    distributed.Client
        As soon as one worker is connected; at once when ``min_workers`` is 0.
    """
    minimum, maximum = _bounds(settings.min_workers, settings.max_workers)
    _check_reachable_from_workers(settings)
    try:
        from dask_kubernetes.operator import KubeCluster
        from distributed import Client
    except ImportError as error:
        raise UnavailableError(
            f"A Kubernetes cluster needs dask-kubernetes: pip install 'inkdask[kubernetes]' "
            f"({error})."
        ) from None

    with ExitStack() as stack:
        with _explained():
            manifest = cluster_manifest(settings, _standing(settings.cluster_namespace))
            pods = Pods(manifest, settings.cluster_namespace)
            stack.callback(pods.remove)
            pods.create()
            pods.autoscale(minimum, maximum)
            with _news() as tell:
                pods.wait_for_scheduler(tell)
                cluster = KubeCluster.from_name(pods.name, namespace=pods.namespace, quiet=True)
                stack.callback(cluster.close)
                client = stack.enter_context(Client(cluster))
                if minimum:
                    pods.wait_for_worker(client, tell)
        yield client


def cluster_manifest(settings: Settings, standing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the `DaskCluster` manifest of a job, with a name of its own.

    Parameters
    ----------
    settings
        ``cluster_spec`` names the file to start from, where there is one.
    standing
        DaskCluster that an admin has applied, with the image and nodes of the place; it is the
        pattern when there is no ``cluster_spec``. Default: the package's own manifest.
    """
    if settings.cluster_spec:
        manifest = _load(settings.cluster_spec)
    else:
        manifest = deepcopy(standing) if standing else _load(_own_manifest())
    name = f"inkdask-{uuid4().hex[:8]}"
    labels = manifest["metadata"].get("labels", {})
    spec = manifest["spec"]
    manifest = {
        "apiVersion": API,
        "kind": "DaskCluster",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }
    spec["idleTimeout"] = IDLE_TIMEOUT
    spec["worker"]["replicas"] = settings.min_workers
    spec["scheduler"]["service"]["selector"]["dask.org/cluster-name"] = name
    for part in ("scheduler", "worker"):
        container = spec[part]["spec"]["containers"][0]
        container.setdefault("args", [])  # because KubeCluster reads them
        if settings.cluster_image:
            container["image"] = settings.cluster_image
        if any(str(one.get("value")).startswith("tls://") for one in container.get("env", [])):
            raise SettingsError(
                "--cluster kubernetes cannot make a cluster with the component tls, because "
                "dask-kubernetes connects without it: use the standing cluster, from a pod, or a "
                "CLUSTER_SPEC without TLS."
            )
    return manifest


def _standing(namespace: str | None) -> dict[str, Any] | None:
    """Return the DaskCluster that ``kubectl apply -k cluster`` made in the namespace, or None."""
    import kr8s

    place = namespace or kr8s.api().namespace
    cluster = object_of("DaskCluster", {"name": STANDING}, {}, place)
    try:
        cluster.refresh()
    except kr8s.NotFoundError:
        return None
    found: dict[str, Any] = cluster.raw.to_dict()
    return {**found, "metadata": {"labels": found["metadata"].get("labels", {})}}


def _own_manifest() -> str:
    """Path of the manifest: in the wheel, or in the sources of an editable install."""
    packaged = Path(str(resources.files(__package__) / MANIFEST))
    sources = Path(__file__).parents[2]
    return str(packaged if packaged.is_file() else sources / "cluster" / "base" / MANIFEST)


def _load(path: str) -> dict[str, Any]:
    """Read the one DaskCluster of a YAML file, which may hold other documents too."""
    import yaml

    try:
        documents = list(yaml.safe_load_all(Path(path).expanduser().read_text()))
        [manifest] = [one for one in documents if one and one.get("kind") == "DaskCluster"]
        manifest["spec"]["scheduler"]["service"]["selector"]
        for part in ("scheduler", "worker"):
            manifest["spec"][part]["spec"]["containers"][0]["image"]
        manifest["metadata"]["name"]
    except OSError as error:
        raise SettingsError(
            f"CLUSTER_SPEC: {path} cannot be read ({error.strerror or error})."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"CLUSTER_SPEC: {path} is not YAML ({first}).") from None
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        raise SettingsError(
            f"CLUSTER_SPEC: {path} must hold one complete DaskCluster, such as `kubectl kustomize "
            "cluster` prints."
        ) from None
    return dict(manifest)


def _bounds(minimum: int, maximum: int | None) -> tuple[int, int]:
    """Least and largest number of workers."""
    if maximum is None:
        return minimum, max(minimum, MAX_WORKERS)
    if minimum > maximum:
        raise SettingsError(f"MIN_WORKERS ({minimum}) is more than MAX_WORKERS ({maximum}).")
    return minimum, maximum


def _check_reachable_from_workers(settings: Settings) -> None:
    """Refuse paths of this machine, which pods do not have, before a cluster is made.

    Pods of the user's own spec may mount a shared file system, so their paths are not checked.
    """
    if settings.cluster_spec:
        return
    for name in (
        "s3_path", "surface_volume_zarr", "mask_path", "zarr_output_dir", "grid", "output_path",
    ):  # fmt: skip
        place = getattr(settings, name)
        if place and place != NO_MASK and storage.is_local(place):
            raise SettingsError(
                f"{env_name(name)}: {place} is a path of this machine, which the workers of a "
                "Kubernetes cluster do not see; give an s3:// URI, or a CLUSTER_SPEC whose pods "
                "mount it."
            )
    if isinstance(settings.model, str) and Path(settings.model).expanduser().exists():
        raise SettingsError(
            f"MODEL: {settings.model} is a path of this machine, which the workers of a Kubernetes "
            "cluster do not see; copy the weights to S3, and give their s3:// URI."
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Turn errors of the Kubernetes API into one sentence."""
    import httpx
    import kr8s

    try:
        yield
    except kr8s.ServerError as error:
        raise UnavailableError(f"Kubernetes refuses: {str(error).rstrip('.')}.") from None
    except (kr8s.APITimeoutError, kr8s.ConnectionClosedError, httpx.HTTPError) as error:
        raise UnavailableError(f"Kubernetes cannot be reached: {error}.") from None
    except ValueError as error:  # the kubeconfig is missing or wrong
        raise UnavailableError(
            f"Kubernetes cannot be reached: {str(error).rstrip('.')}; is KUBECONFIG set?"
        ) from None


@contextmanager
def _news() -> Iterator[Callable[[str], None]]:
    """Show how a wait goes: one live line on a terminal, elsewhere a line for each change."""
    console, last = Console(stderr=True), ""
    with console.status("") as line:

        def tell(sentence: str) -> None:
            nonlocal last
            if console.is_terminal:
                line.update(Text(sentence))
            elif sentence != last:
                write(sentence)
            last = sentence

        yield tell
