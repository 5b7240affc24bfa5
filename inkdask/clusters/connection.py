"""Connect a job to the cluster that the setting `cluster` names."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from inkdask import engine
from inkdask.clusters.cuda import cuda
from inkdask.clusters.kubernetes import kubernetes
from inkdask.clusters.local import local
from inkdask.errors import InkdaskError, UnavailableError
from inkdask.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("inkdask")

PATIENCE = 8  # seconds for a scheduler to answer, unless Dask's settings say another time
NAMED = 3  # processes that a message names


@contextmanager
def connect(settings: Settings) -> Iterator[Client | None]:
    """Give the client of the cluster that the settings name, as the current one.

    ``cluster="threads"`` without an address starts nothing: the job runs on the caller's own
    client where there is one, else on the threads of this process. A cluster that is started here
    ends with the block, whatever happens in it.
    """
    address = settings.scheduler_address or settings.cluster
    if address == "threads":
        with engine.reaching(client := engine.current_client()):
            if client is not None:
                check_workers(client)
            yield None
        return
    with script_left_out(), start(address, settings) as client, engine.reaching(client):
        log.info("Dashboard of the cluster: %s", client.dashboard_link)
        check_workers(client)
        yield client


@contextmanager
def script_left_out() -> Iterator[None]:
    """Keep worker processes that begin within the block from running the user's script.

    A process that Python starts runs the script of its parent first. A script without the line
    ``if __name__ == "__main__":`` would start workers there again. Workers need no script, because
    functions of it travel by value.
    """
    main: Any = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def start(address: str, settings: Settings) -> AbstractContextManager[Client]:
    """Make a cluster of this kind, or connect to this address."""
    if address == "local":
        return local(settings.max_workers)
    if address == "cuda":
        named = "cuda_visible_devices" in settings.model_fields_set
        return cuda(settings.cuda_visible_devices if named else None, settings.max_workers)
    return kubernetes(settings) if address == "kubernetes" else existing(address)


def check_workers(client: Client) -> None:
    """Refuse a scheduler or a worker that cannot import this version of inkdask.

    Where there is no worker yet, say that the job waits for one.

    Each process is asked what it imports, because `Client.get_versions` reads the metadata of
    installed packages, which another copy on the path may precede. The question is a call of
    `eval`, because a function of this module cannot be unpickled where inkdask is missing.
    """
    ours = sys.modules["inkdask"].__version__
    question = "__import__('inkdask').__version__"
    try:
        answer = client.run_on_scheduler(eval, question)
    except Exception as error:
        answer = error
    scheduler = f"scheduler at {client.scheduler_info(n_workers=0)['address']}"
    answers = {f"the {scheduler}": answer}
    workers = client.run(eval, question, on_error="return")
    answers |= {f"the worker at {address}": answer for address, answer in workers.items()}

    def inkdask_of(answer: Any) -> str:
        if isinstance(answer, ImportError):
            return "none"
        said = str(answer).partition("\n")[0]
        return f"a broken one ({said})" if isinstance(answer, Exception) else said

    wrong = [
        f"{where} has {inkdask_of(answer)}"
        for where, answer in answers.items()
        if answer != ours and not isinstance(answer, OSError)  # which has just been lost
    ]
    if wrong:
        more = [f"{len(wrong) - NAMED} more differ too"] if len(wrong) > NAMED else []
        *others, last = wrong[:NAMED] + more
        there = f"{', '.join(others)} and {last}" if others else last
        raise InkdaskError(
            f"This process has inkdask {ours}, but {there}: install inkdask {ours} there, and "
            "start the cluster again."
        )
    if not workers:
        log.warning("The %s has no workers: the job waits for one", scheduler)


@contextmanager
def existing(address: str) -> Iterator[Client]:
    """Connect to a running scheduler; ``tls://`` takes certificates from Dask's settings."""
    from distributed import Client

    before = engine.current_client()
    try:
        client = Client(address, timeout=_patience())
    except (OSError, TypeError, ValueError) as error:  # TypeError where certificates are missing
        if (broken := engine.current_client()) not in (None, before):
            broken.close()  # else it would stay the current client
        reason = str(error).splitlines()[0].rstrip(".")
        raise UnavailableError(f"The scheduler at {address} cannot be used: {reason}.") from error
    with client:
        yield client


def _patience() -> str | float:
    """Time for a scheduler to answer: Dask's setting unless that is its default, else PATIENCE."""
    import dask
    from distributed.config import defaults

    said = dask.config.get("distributed.comm.timeouts.connect")
    default = defaults["distributed"]["comm"]["timeouts"]["connect"]
    return PATIENCE if said == default else said
