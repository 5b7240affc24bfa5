"""Files and zarr arrays at local paths and at ``s3://`` and ``https://`` URIs."""

from inkdask.storage.counting import Counters, counters
from inkdask.storage.files import (
    Entry,
    absolute,
    code_of,
    decoded,
    entry,
    exists,
    explained,
    filesystem,
    find_entries,
    has_credentials,
    is_http,
    is_local,
    join,
    list_files,
    list_folder,
    open_array,
    put_file,
    read_bytes,
    read_middle,
    read_range,
    s3_filesystem,
    write_bytes,
    writing,
    zarr_array,
    zarr_node,
    zarr_store,
)

__all__ = [
    "Counters", "Entry", "absolute", "code_of", "counters", "decoded", "entry", "exists",
    "explained", "filesystem", "find_entries", "has_credentials", "is_http",
    "is_local", "join", "list_files", "list_folder", "open_array", "put_file", "read_bytes",
    "read_middle", "read_range", "s3_filesystem", "write_bytes", "writing", "zarr_array",
    "zarr_node", "zarr_store",
]  # fmt: skip
