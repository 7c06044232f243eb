"""Files and folders on a disk or in an object store (s3://, gs://), read and written by the same functions.

An incomplete file or folder never has its final name: on a disk it gets a temporary name first and is renamed. In an
object store a put is atomic, and a folder is finished when the file that is written last is there.
"""

from cluster.storage.downloads import fetch_file, fetch_folder, local_copy
from cluster.storage.files import (
    MAX_CONCURRENT_REQUESTS,
    exists,
    file_size,
    free_bytes,
    is_file,
    list_entries,
    list_files,
    list_names,
    move_file,
    open_file,
    read_bytes,
    read_json,
    read_json_object,
    refuse_existing,
    refuse_unwritable,
    remove_file,
    sha256_file,
    upload_file,
    write_atomically,
    write_json_atomically,
)
from cluster.storage.folders import move_folder, publish_folder, remove_folder, remove_stale_temporaries
from cluster.storage.object_stores import retry_throttled
from cluster.storage.paths import (
    absolute,
    cache_folder,
    is_local,
    join,
    local_folder_for,
    local_path,
    nearest_folder,
    quoted,
    refuse_job_folder,
    resolve,
    split,
)
from cluster.storage.read_ahead import map_ahead, open_in_order
from cluster.storage.retried_reads import open_retried
from cluster.storage.shared_folders import SharedFolder, mark_folder
from cluster.storage.temporaries import TEMPORARY_PREFIX, lock, temporary_path

__all__ = [
    "MAX_CONCURRENT_REQUESTS",
    "TEMPORARY_PREFIX",
    "SharedFolder",
    "absolute",
    "cache_folder",
    "exists",
    "fetch_file",
    "fetch_folder",
    "file_size",
    "free_bytes",
    "is_file",
    "is_local",
    "join",
    "list_entries",
    "list_files",
    "list_names",
    "local_copy",
    "local_folder_for",
    "local_path",
    "lock",
    "map_ahead",
    "mark_folder",
    "move_file",
    "move_folder",
    "nearest_folder",
    "open_file",
    "open_in_order",
    "open_retried",
    "publish_folder",
    "quoted",
    "read_bytes",
    "read_json",
    "read_json_object",
    "refuse_existing",
    "refuse_job_folder",
    "refuse_unwritable",
    "remove_file",
    "remove_folder",
    "remove_stale_temporaries",
    "resolve",
    "retry_throttled",
    "sha256_file",
    "split",
    "temporary_path",
    "upload_file",
    "write_atomically",
    "write_json_atomically",
]
