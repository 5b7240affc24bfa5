"""Where bytes lie: local paths and ``s3://`` URIs behind the same few functions."""

from inkdask.storage.counting import Counters, counters
from inkdask.storage.files import (
    Entry,
    entry,
    exists,
    explain,
    explained,
    filesystem,
    is_local,
    join,
    list_folder,
    put_file,
    read_bytes,
    read_range,
    s3_filesystem,
    write_bytes,
    writing,
    zarr_store,
)

__all__ = [
    "Counters",
    "Entry",
    "counters",
    "entry",
    "exists",
    "explain",
    "explained",
    "filesystem",
    "is_local",
    "join",
    "list_folder",
    "put_file",
    "read_bytes",
    "read_range",
    "s3_filesystem",
    "write_bytes",
    "writing",
    "zarr_store",
]
