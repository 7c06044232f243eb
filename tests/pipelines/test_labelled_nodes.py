"""Workers on a cluster whose nodes have labels."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import ray
from tiny import tiny_recipe

from cluster.placement import WorkerNeeds
from cluster.session import require_resources
from pipelines.config.training import WorkersConfig
from pipelines.scoring.workers.actor_pool import run_on_actors
from pipelines.stage import StageContext
from pipelines.training.group.run_workers import RAY_FOLDER, run_workers

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(monkeypatch):
    """Return the address of a cluster, and the ids of its labelled nodes by label."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        added = {pool: cluster.add_node(num_cpus=3, labels={"pool": pool}) for pool in ("cheap", "big")}
        yield cluster.address, {pool: node.node_id for pool, node in added.items()}
    finally:
        cluster.shutdown()


def test_workers_run_on_nodes_with_the_selected_label(tmp_path, nodes):
    # In a process of its own: in this one other tests may have joined another Ray.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_nodes, tmp_path, *nodes).result()


def check_nodes(tmp_path, address, ids):
    config = tiny_recipe(
        tmp_path, "train.label_selector.pool=big", "encode.label_selector.pool=!in(big, none)", "train.num_workers=2"
    )

    def write_node(worker, folder):
        (folder / f"{worker.rank}").write_text(ray.get_runtime_context().get_node_id())

    def node_of(row):
        return {"node": ray.get_runtime_context().get_node_id()}

    def note_node():
        return lambda file: file.write_text(ray.get_runtime_context().get_node_id())

    folder = tmp_path / "nodes"
    folder.mkdir()
    with StageContext(config, address=address) as context:
        run_workers(
            context,
            "train",
            config.train,
            write_node,
            folder,
            lambda message: None,
            ray_folder=config.folder(RAY_FOLDER),
        )
        assert {file.read_text() for file in folder.iterdir()} == {ids["big"]}
        ray_data = context.ray_data(config.encode, "encode")
        rows = ray_data.from_items([1, 2], override_num_blocks=2).map(node_of, **config.encode.placement).take_all()
        assert ids["big"] not in {row["node"] for row in rows}
        drawn = tmp_path / "drawn"
        drawn.mkdir()
        placed = WorkersConfig(num_workers=2, label_selector={"pool": "cheap"})
        list(run_on_actors([drawn / "1", drawn / "2"], note_node, placed, print, [str(drawn)]))
        assert {file.read_text() for file in drawn.iterdir()} == {ids["cheap"]}
        with pytest.raises(ValueError, match=r"train\.label_selector: no node has pool = fast \(values: big, cheap\)"):
            require_resources(1, WorkerNeeds(cpus=1, gpus=0, label_selector={"pool": "fast"}), "train")
