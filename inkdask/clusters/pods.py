"""The pods of a Dask cluster on Kubernetes: make them, wait for them, say why they do not start."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from inkdask.errors import UnavailableError

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("inkdask")

API = "kubernetes.dask.org/v1"
IDLE_TIMEOUT = 1800  # seconds, after which the operator removes a cluster whose client is gone
PATIENCE = 90  # seconds for the operator to react, and for a pod with a HOPELESS reason to recover
GOODBYE = 120  # seconds for the pods to end
INTERVAL = 1.0  # seconds between looks at the pods

# Reasons for which a container waits, and which rarely go away by waiting.
HOPELESS = {
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "InvalidImageName",
}


class Pods:
    """One Dask cluster on Kubernetes: make it, wait for its pods, remove it."""

    def __init__(self, manifest: dict[str, Any], namespace: str | None) -> None:
        import kr8s

        self.name: str = manifest["metadata"]["name"]
        self.namespace: str = namespace or str(kr8s.api().namespace)
        self._cluster = self._object("DaskCluster", manifest["metadata"], manifest["spec"])
        self._refused = False
        self._hopeless_since: float | None = None
        self._started = time.monotonic()

    def _object(self, kind: str, metadata: dict[str, Any], spec: dict[str, Any]) -> Any:
        return object_of(kind, metadata, spec, self.namespace)

    def create(self) -> None:
        """Make the DaskCluster; the operator makes its pods."""
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
        """Let the number of workers follow the work; removing the cluster removes this too."""
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
        """Wait until the scheduler is ready; ``tell`` gets a sentence at each look."""
        while not _is_up(pods := self._list(), "scheduler"):
            if not pods and time.monotonic() - self._started > PATIENCE:
                raise UnavailableError(
                    f"Nothing happens to the DaskCluster {self.name} in namespace "
                    f"{self.namespace}: the Dask operator does not seem to run."
                )
            self._look(pods, tell)

    def wait_for_worker(self, client: Client, tell: Callable[[str], None]) -> None:
        """Wait until one worker is connected; ``tell`` gets a sentence at each look."""
        while not client.scheduler_info(n_workers=1).get("workers"):
            if client.status == "closed":
                raise UnavailableError(
                    f"The DaskCluster {self.name} in namespace {self.namespace} is gone: no worker "
                    f"had a place in {IDLE_TIMEOUT // 60} minutes, or somebody removed it."
                )
            self._look(self._list(), tell)

    def remove(self) -> None:
        """Remove the cluster with all that it owns, and wait until it is gone."""
        import httpx
        import kr8s

        if self._refused:
            return
        end = time.monotonic() + GOODBYE
        # A cluster that is removed while it is made may leave its group of workers behind.
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
        """Tell the state of the pods, and give up on pods that cannot start."""
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


def object_of(kind: str, metadata: dict[str, Any], spec: dict[str, Any], namespace: str) -> Any:
    """Return an object of a kind of the Dask operator, as kr8s has it."""
    from kr8s.objects import new_class

    body = {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}
    return new_class(kind, API, asyncio=False)(body, namespace=namespace)


def pods_of(cluster: str, namespace: str) -> list[Any]:
    """List the pods of a Dask cluster; try again while the API server does not answer."""
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
    """State of the pods: ``scheduler running, 1 worker pending (0/3 nodes have a GPU)``."""
    if not pods:
        return "waiting for the operator"
    told = []
    for component in ("scheduler", "worker"):
        states = Counter(_state(pod) for pod in pods if _component(pod) == component)
        for state, count in states.items():
            number = "" if component == "scheduler" else f"{count} "
            told.append(f"{number}{component}{'s' if count > 1 else ''} {state}")
    return ", ".join(told)


def reason(pod: Any) -> str:
    """Reason in the words of Kubernetes for which a pod does not run, or an empty text."""
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


def _state(pod: Any) -> str:
    phase = str(_status(pod).get("phase") or "Pending").lower()
    phase = "starting" if phase == "running" and not _is_ready(pod) else phase
    why = reason(pod)
    return f"{phase} ({why})" if why else phase


def _is_ready(pod: Any) -> bool:
    conditions = _status(pod).get("conditions") or []
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def _is_up(pods: list[Any], component: str) -> bool:
    return any(_component(pod) == component and _is_ready(pod) for pod in pods)


def _waiting(pod: Any) -> dict[str, Any]:
    """Waiting state (reason, message) of the first container that waits, or an empty dict."""
    for container in _status(pod).get("containerStatuses") or []:
        if waiting := (container.get("state") or {}).get("waiting"):
            return dict(waiting)
    return {}


def _last_words(pod: Any) -> str:
    """Last line that a container logged before it ended, as the end of a sentence."""
    lines: list[str] = []
    with suppress(Exception):  # a pod may have no log, and the message is right without it
        lines = [line for line in pod.logs(tail_lines=1, previous=True) if line.strip()]
    return f"; its last words: {lines[-1].strip()}" if lines else ""
