from pathlib import Path

from away import away  # noqa: F401
from buckets import gs_bucket, s3_app, s3_bucket, s3_server, throttled  # noqa: F401
from local_ray import local_ray  # noqa: F401
from ray_head import ray_head  # noqa: F401
from tiny_disk import tiny_disk  # noqa: F401
from tiny_run import finished, start_early, started_run, submit, whole_run  # noqa: F401
from workers import workers  # noqa: F401

# `make benchmark` runs these, without this file. What else is in their folder tests the GPU benchmarks' own functions.
collect_ignore = [
    str(file)
    for file in Path(__file__).parent.glob("benchmarks/test_*.py")
    if "pytest.mark.benchmark" in file.read_text(encoding="utf-8")
]
