from ray_head import ray_head  # noqa: F401
