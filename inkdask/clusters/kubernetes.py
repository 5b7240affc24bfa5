"""A Dask cluster on Kubernetes, for the time of one job.

dask-kubernetes has an operator that turns a `DaskCluster` manifest into pods. The manifest is the
one that ``kubectl apply -k cluster`` applies: it comes with the package. Whatever happens to the
job, the cluster is removed; should even this process be killed, the operator removes it when it has
been idle for a while.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rich.console import Console
from rich.text import Text
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from inkdask import storage
from inkdask.errors import SettingsError, UnavailableError
from inkdask.settings import Settings, env_name
from inkdask.specs import NO_MASK

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("inkdask")

API = "kubernetes.dask.org/v1"
MANIFEST = "dask-cluster.yaml"
STANDING = "inkdask"  # the cluster that the manifests make
MAX_WORKERS = 8
IDLE_TIMEOUT = 1800  # seconds, after which the operator removes a cluster whose client is gone
PATIENCE = 90  # seconds for the operator to react, and for a pod that cannot start to do so still
GOODBYE = 120  # seconds for the pods to end
INTERVAL = 1.0  # seconds between looks at the pods

# Why a container waits, when waiting does not help as a rule.
HOPELESS = {
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "InvalidImageName",
}


@contextmanager
def kubernetes(settings: Settings) -> Iterator[Client]:
    """Make a Dask cluster, and remove it again in any case.

    Works inside the Kubernetes cluster and outside: there, the scheduler's port is forwarded.

    Parameters
    ----------
    settings
        ``min_workers`` and ``max_workers`` bound the number of workers, which follows the work;
        ``cluster_namespace``, ``cluster_image`` and ``cluster_spec`` say where and of what they
        are made.

    Yields
    ------
    distributed.Client
        As soon as the first worker is there; at once when ``min_workers`` is 0.

    Raises
    ------
    InkdaskError
        When Kubernetes cannot be reached, or does not start the pods: its own reason, in one
        sentence.
    """
    minimum, maximum = _bounds(settings)
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
            pods = stack.enter_context(_made(manifest, settings.cluster_namespace))
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
    """Return the `DaskCluster` of a job, with a name of its own.

    Parameters
    ----------
    settings
        With ``cluster_spec``, the file that holds another one than usual.
    standing
        The one that an admin has applied: as the usual one, with the image and nodes of the place.

    Raises
    ------
    InkdaskError
        When ``cluster_spec`` is not a file that holds one, in one sentence.
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
        container.setdefault("args", [])  # KubeCluster looks into them
        if settings.cluster_image:
            container["image"] = settings.cluster_image
    return manifest


def _standing(namespace: str | None) -> dict[str, Any] | None:
    """The cluster that ``kubectl apply -k cluster`` has made in the namespace, if it has."""
    import kr8s
    from kr8s.objects import new_class

    kind = new_class("DaskCluster", API, asyncio=False)
    cluster = kind({"metadata": {"name": STANDING}}, namespace=namespace or kr8s.api().namespace)
    try:
        cluster.refresh()
    except kr8s.NotFoundError:
        return None
    found: dict[str, Any] = cluster.raw.to_dict()
    return {**found, "metadata": {"labels": found["metadata"].get("labels", {})}}


def _own_manifest() -> str:
    """The manifest as the wheel brings it, or as it lies in the sources of an editable install."""
    packaged = Path(str(resources.files(__package__) / MANIFEST))
    return str(packaged if packaged.is_file() else _sources() / "cluster" / "base" / MANIFEST)


def _sources() -> Path:
    return Path(__file__).parents[2]


def _load(path: str) -> dict[str, Any]:
    """Read the one DaskCluster of a file, which may hold other documents too."""
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


def _bounds(settings: Settings) -> tuple[int, int]:
    """Fewest and most workers."""
    minimum, maximum = settings.min_workers, settings.max_workers
    if maximum is None:
        return minimum, max(minimum, MAX_WORKERS)
    if minimum > maximum:
        raise SettingsError(f"MIN_WORKERS ({minimum}) is more than MAX_WORKERS ({maximum}).")
    return minimum, maximum


def _check_reachable_from_workers(settings: Settings) -> None:
    """Fail before a cluster is made for paths of this machine, which its pods do not have.

    Pods of the user's own spec may have them: a shared file system, mounted at the same place.
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
def _made(manifest: dict[str, Any], namespace: str | None) -> Iterator[_Pods]:
    """Make the cluster; afterwards remove it, and all that was made for it."""
    pods = _Pods(manifest, namespace)
    try:
        pods.create()
        yield pods
    finally:
        pods.remove()


class _Pods:
    """The objects of one Dask cluster, as Kubernetes tells of them."""

    def __init__(self, manifest: dict[str, Any], namespace: str | None) -> None:
        import kr8s
        from kr8s.objects import new_class

        self.name: str = manifest["metadata"]["name"]
        self.namespace: str = namespace or str(kr8s.api().namespace)
        self._kinds = {
            kind: new_class(kind, API, asyncio=False)
            for kind in ("DaskCluster", "DaskWorkerGroup", "DaskAutoscaler")
        }
        self._cluster = self._object("DaskCluster", manifest["metadata"], manifest["spec"])
        self._refused = False
        self._hopeless_since: float | None = None
        self._started = time.monotonic()

    def _object(self, kind: str, metadata: dict[str, Any], spec: dict[str, Any]) -> Any:
        body = {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}
        return self._kinds[kind](body, namespace=self.namespace)

    def create(self) -> None:
        import kr8s

        try:
            self._cluster.create()
        except kr8s.ServerError as error:
            self._refused = True
            if error.response is not None and error.response.status_code == 404:
                raise UnavailableError(
                    f"Namespace {self.namespace} of this Kubernetes cluster is not there, or the "
                    "cluster has no Dask operator: see cluster/README.md."
                ) from None
            raise

    def autoscale(self, minimum: int, maximum: int) -> None:
        """Let the number of workers follow the work; the autoscaler goes with the cluster."""
        owner = {
            "apiVersion": API,
            "kind": "DaskCluster",
            "name": self.name,
            "uid": self._cluster.metadata.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        spec = {"cluster": self.name, "minimum": minimum, "maximum": maximum}
        metadata = {"name": self.name, "ownerReferences": [owner]}
        self._object("DaskAutoscaler", metadata, spec).create()

    def wait_for_scheduler(self, tell: Callable[[str], None]) -> None:
        while not _is_up(pods := self._list(), "scheduler"):
            if not pods and time.monotonic() - self._started > PATIENCE:
                raise UnavailableError(
                    f"Nothing happens to the DaskCluster {self.name} in namespace "
                    f"{self.namespace}: the Dask operator does not seem to run."
                )
            self._look(pods, tell)

    def wait_for_worker(self, client: Client, tell: Callable[[str], None]) -> None:
        while not client.scheduler_info(n_workers=1).get("workers"):
            if client.status == "closed":
                raise UnavailableError(
                    f"The DaskCluster {self.name} in namespace {self.namespace} is gone: no worker "
                    f"had a place in {IDLE_TIMEOUT // 60} minutes, or somebody removed it."
                )
            self._look(self._list(), tell)

    def remove(self) -> None:
        """Remove the cluster; Kubernetes removes what it owns, and then the cluster is gone."""
        import httpx
        import kr8s

        if self._refused:
            return
        end = time.monotonic() + GOODBYE
        # The last kind is what a cluster that is removed while it is made may leave behind.
        group = self._object("DaskWorkerGroup", {"name": f"{self.name}-default"}, {})
        left = [self._cluster, group]
        while left and time.monotonic() < end:
            try:
                left[0].delete(propagation_policy="Foreground")
            except kr8s.NotFoundError:
                left.pop(0)
                continue
            except (kr8s.ServerError, kr8s.APITimeoutError, httpx.HTTPError) as error:
                log.debug("%s: %s", self.name, error)
            time.sleep(INTERVAL)
        if left:
            log.warning(
                "The Dask cluster is not removed yet: kubectl delete daskcluster --namespace %s %s",
                self.namespace,
                self.name,
            )

    def _list(self) -> list[Any]:
        return pods_of(self.name, self.namespace)

    def _look(self, pods: list[Any], tell: Callable[[str], None]) -> None:
        """Say how the pods are doing, and give up on those that cannot start."""
        tell(f"Kubernetes cluster {self.name} in namespace {self.namespace}: {summary(pods)}")
        stuck = [pod for pod in pods if _waiting(pod).get("reason") in HOPELESS]
        if not stuck:
            self._hopeless_since = None
        elif self._hopeless_since is None:
            self._hopeless_since = time.monotonic()
        elif time.monotonic() - self._hopeless_since > PATIENCE:
            raise UnavailableError(
                f"Kubernetes does not get the {_component(stuck[0])} started in namespace "
                f"{self.namespace}: {reason(stuck[0])}{_last_words(stuck[0])}."
            )
        time.sleep(INTERVAL)


def pods_of(cluster: str, namespace: str) -> list[Any]:
    """List the pods of a Dask cluster; an API server may be away for a moment."""
    import httpx
    import kr8s

    patiently = Retrying(
        retry=retry_if_exception_type((kr8s.APITimeoutError, httpx.TransportError)),
        stop=stop_after_delay(PATIENCE),
        wait=wait_fixed(INTERVAL),
        reraise=True,
    )
    labels = {"dask.org/cluster-name": cluster}
    return patiently(lambda: list(kr8s.get("pods", namespace=namespace, label_selector=labels)))


def summary(pods: list[Any]) -> str:
    """How pods are doing: ``scheduler running, 1 worker pending (0/3 nodes have a GPU)``."""
    if not pods:
        return "waiting for the operator"
    told = []
    for component in ("scheduler", "worker"):
        states: dict[str, int] = {}
        for pod in pods:
            if _component(pod) == component:
                why = reason(pod)
                state = _phase(pod) + (f" ({why})" if why else "")
                states[state] = states.get(state, 0) + 1
        for state, count in states.items():
            number = "" if component == "scheduler" else f"{count} "
            told.append(f"{number}{component}{'s' if count > 1 else ''} {state}")
    return ", ".join(told)


def reason(pod: Any) -> str:
    """Why a pod does not run, in the words of Kubernetes; empty when there is no reason."""
    waiting = _waiting(pod)
    if waiting.get("reason") in (None, "ContainerCreating", "PodInitializing"):
        for condition in _status(pod).get("conditions") or []:
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return str(condition.get("message") or condition.get("reason") or "").rstrip(".")
        return ""
    return ": ".join(filter(None, (waiting["reason"], waiting.get("message")))).rstrip(".")


def _status(pod: Any) -> dict[str, Any]:
    return pod.raw.get("status") or {}


def _component(pod: Any) -> str:
    return str(pod.labels.get("dask.org/component", ""))


def _phase(pod: Any) -> str:
    phase = str(_status(pod).get("phase") or "Pending").lower()
    return "starting" if phase == "running" and not _is_ready(pod) else phase


def _is_ready(pod: Any) -> bool:
    conditions = _status(pod).get("conditions") or []
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def _is_up(pods: list[Any], component: str) -> bool:
    return any(_component(pod) == component and _is_ready(pod) for pod in pods)


def _waiting(pod: Any) -> dict[str, Any]:
    """What Kubernetes says of the first container of a pod that waits."""
    for container in _status(pod).get("containerStatuses") or []:
        if waiting := (container.get("state") or {}).get("waiting"):
            return dict(waiting)
    return {}


def _last_words(pod: Any) -> str:
    """The last line that a container wrote before it ended."""
    lines: list[str] = []
    with suppress(Exception):  # there may be no log, and it is only a help
        lines = [line for line in pod.logs(tail_lines=1, previous=True) if line.strip()]
    return f"; its last words: {lines[-1].strip()}" if lines else ""


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the Kubernetes API says into one sentence."""
    import httpx
    import kr8s

    try:
        yield
    except kr8s.ServerError as error:
        raise UnavailableError(f"Kubernetes refuses: {str(error).rstrip('.')}.") from None
    except (kr8s.APITimeoutError, kr8s.ConnectionClosedError, httpx.HTTPError) as error:
        raise UnavailableError(f"Kubernetes cannot be reached: {error}.") from None
    except ValueError as error:  # no kubeconfig, or one that makes no sense
        raise UnavailableError(
            f"Kubernetes cannot be reached: {str(error).rstrip('.')}; is KUBECONFIG set?"
        ) from None


@contextmanager
def _news() -> Iterator[Callable[[str], None]]:
    """Tell how a wait goes: one living line on a terminal, elsewhere a line for each change."""
    console, last = Console(stderr=True), ""
    with console.status("") as line:

        def tell(sentence: str) -> None:
            nonlocal last
            if console.is_terminal:
                line.update(Text(sentence))
            elif sentence != last:
                print(sentence, file=sys.stderr, flush=True)
            last = sentence

        yield tell
