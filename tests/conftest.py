from away import away  # noqa: F401
from buckets import gs_bucket, s3_app, s3_bucket, s3_server, throttled  # noqa: F401
from local_ray import local_ray  # noqa: F401
from ray_head import ray_head  # noqa: F401
from tiny_disk import tiny_disk  # noqa: F401
from tiny_run import finished, start_early, started_run, submit, whole_run  # noqa: F401
from workers import workers  # noqa: F401

collect_ignore = ["benchmarks"]  # `make benchmark` runs them, without this file
