"""From the setting `cluster` to a client, and back to nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from inkdask import engine
from inkdask.clusters.cuda import cuda
from inkdask.clusters.kubernetes import kubernetes
from inkdask.clusters.local import local
from inkdask.errors import UnavailableError
from inkdask.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("inkdask")

PATIENCE = 8  # seconds for a scheduler to answer, where Dask's own settings do not say


@contextmanager
def connect(settings: Settings) -> Iterator[Client | None]:
    """Give the client of the cluster that the settings name, as the current one.

    With ``cluster="threads"`` and no address nothing is started: the job runs on the caller's own
    client if there is one, else on the threads of this process. A cluster that is started here
    ends with the block, whatever happens in it.

    Raises
    ------
    InkdaskError
        When the scheduler does not answer, or the cluster cannot be started.
    """
    address = settings.scheduler_address or settings.cluster
    if address == "threads":
        yield None
        return
    with start(address)(settings) as client:
        log.info("Dashboard of the cluster: %s", client.dashboard_link)
        yield client


def start(address: str) -> Callable[[Settings], AbstractContextManager[Client]]:
    """The function that makes a cluster of this kind, or connects to this address."""
    if address == "local":
        return local
    if address == "cuda":
        return cuda
    if address == "kubernetes":
        return kubernetes
    return existing


@contextmanager
def existing(settings: Settings) -> Iterator[Client]:
    """Connect to a running scheduler; ``tls://`` uses Dask's own TLS configuration."""
    from distributed import Client

    address = settings.scheduler_address or settings.cluster
    before = engine.current_client()
    try:
        client = Client(address, timeout=_patience())
    except (OSError, TypeError, ValueError) as error:  # no certificates is a TypeError
        if (broken := engine.current_client()) not in (None, before):
            broken.close()  # it would be the current one still
        reason = str(error).splitlines()[0].rstrip(".")
        raise UnavailableError(f"The scheduler at {address} cannot be used: {reason}.") from error
    with client:
        yield client


def _patience() -> str | float:
    """How long a scheduler may take to answer: Dask's setting, where it is not its default."""
    import dask
    from distributed.config import defaults

    said = dask.config.get("distributed.comm.timeouts.connect")
    default = defaults["distributed"]["comm"]["timeouts"]["connect"]
    return PATIENCE if said == default else said
