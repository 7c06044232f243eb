"""Files and folders on a disk or in an object store (s3://, gs://), read and written by the same functions.

Nothing half-written is ever seen under its final name: on disk a file or folder gets a temporary name first and is
renamed; in an object store one put is atomic, and a folder is finished when its last file is there.
"""

from cluster.storage.downloads import fetch_file, fetch_folder, local_copy
from cluster.storage.files import (
    REQUESTS_AT_ONCE,
    exists,
    file_size,
    free_bytes,
    list_files,
    list_names,
    move_file,
    opened,
    read_bytes,
    read_json,
    refuse_existing,
    remove_file,
    sha256_file,
    upload_file,
    write_atomically,
    write_json_atomically,
)
from cluster.storage.folders import move_folder, publish_folder, remove_folder, remove_stale_temporaries
from cluster.storage.object_stores import patiently
from cluster.storage.paths import (
    absolute,
    cache_folder,
    is_local,
    join,
    local_path,
    nearest_folder,
    on_this_machine,
    resolve,
    split,
)
from cluster.storage.read_ahead import opened_in_order
from cluster.storage.temporaries import TEMPORARY_PREFIX, alone_in, temporary_in

__all__ = [
    "REQUESTS_AT_ONCE",
    "TEMPORARY_PREFIX",
    "absolute",
    "alone_in",
    "cache_folder",
    "exists",
    "fetch_file",
    "fetch_folder",
    "file_size",
    "free_bytes",
    "is_local",
    "join",
    "list_files",
    "list_names",
    "local_copy",
    "local_path",
    "move_file",
    "move_folder",
    "nearest_folder",
    "on_this_machine",
    "opened",
    "opened_in_order",
    "patiently",
    "publish_folder",
    "read_bytes",
    "read_json",
    "refuse_existing",
    "remove_file",
    "remove_folder",
    "remove_stale_temporaries",
    "resolve",
    "sha256_file",
    "split",
    "temporary_in",
    "upload_file",
    "write_atomically",
    "write_json_atomically",
]
