"""Worker pods of a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from inkdask.settings import Settings
from inkdask.types import InkdaskError

if TYPE_CHECKING:
    from distributed import Client


@contextmanager
def kubernetes(settings: Settings) -> Iterator[Client]:
    """Not there yet."""
    raise InkdaskError("--cluster kubernetes is not there yet.")
    yield
