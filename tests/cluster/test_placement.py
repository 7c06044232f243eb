"""Whether workers fit on nodes, as dictionaries like those of `ray.nodes()`."""

import re

import pytest
from ray._private.label_utils import validate_label_selector_value

from cluster.placement import WorkerNeeds, can_grow_to, fits_labels, label_condition, what_is_missing, workers_on

CHEAP = {
    "Resources": {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0},
    "Labels": {"ray.io/accelerator-type": "L4", "ray.io/market-type": "spot", "team": "a"},
}
BIG = {
    "Resources": {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
    "Labels": {"ray.io/accelerator-type": "H100", "ray.io/market-type": "on-demand"},
}
PLAIN = {"Resources": {"CPU": 16.0}}
NODES = [PLAIN, CHEAP, CHEAP, BIG]


@pytest.mark.parametrize(
    ("needs", "room"),
    [
        ({"cpus": 1}, 16 + 8 + 8 + 96),
        ({"cpus": 1, "gpus": 1}, 10),
        ({"cpus": 1, "gpus": 0.5}, 20),
        ({"cpus": 1, "gpus": 2}, 4),
        ({"cpus": 1, "gpus": 1, "accelerator_type": "L4"}, 2),
        ({"cpus": 1, "gpus": 1, "accelerator_type": "H100"}, 8),
        ({"cpus": 1, "gpus": 1, "accelerator_type": "T4"}, 0),
        ({"cpus": 1, "gpus": 1, "label_selector": {"ray.io/market-type": "spot"}}, 2),
        ({"cpus": 1, "gpus": 1, "label_selector": {"ray.io/market-type": "!spot"}}, 8),
        ({"cpus": 1, "label_selector": {"team": "!a"}}, 16 + 96),
        ({"cpus": 1, "gpus": 1, "accelerator_type": "L4", "label_selector": {"ray.io/market-type": "on-demand"}}, 0),
    ],
)
def test_workers_are_counted_on_the_nodes_that_have_what_they_need(needs, room):
    assert sum(workers_on(node, WorkerNeeds(**needs)) for node in NODES) == room


@pytest.mark.parametrize(
    ("condition", "fitting"),
    [
        ("spot", {"spot"}),
        ("!spot", {"on-demand", None}),
        ("in(spot, on-demand)", {"spot", "on-demand"}),
        ("in(spot,on-demand)", {"spot", "on-demand"}),
        ("!in(spot, on-demand)", {None}),
    ],
)
def test_label_conditions_are_rays(condition, fitting):
    assert validate_label_selector_value(condition) is None
    nodes = {value: {"Labels": {"market": value} if value else {}} for value in ("spot", "on-demand", None)}
    assert {value for value, node in nodes.items() if fits_labels(node, {"market": condition})} == fitting


@pytest.mark.parametrize("condition", ["-spot", "spot_", "in()", "in(spot,", "in(H100, TPU!GPU)", "!!!in(H100, TPU)"])
def test_what_ray_would_refuse_is_refused_with_what_is_allowed(condition):
    assert validate_label_selector_value(condition)
    with pytest.raises(ValueError, match="label_selector: found market = .*expected a value"):
        label_condition("market", condition)


@pytest.mark.parametrize(
    ("num_workers", "needs", "said"),
    [
        (
            3,
            {"accelerator_type": "L4"},
            r"3 workers of 1 CPU, 1 GPU each on L4.* room for 2 .*num_workers to 2 or less",
        ),
        (1, {"accelerator_type": "A100"}, r"set train.accelerator_type to what is there \(H100, L4\) or leave it out"),
        (
            1,
            {"label_selector": {"team": "b"}},
            r"labelled team = b.*no node has team = b \(there: a\): change train.lab",
        ),
        (1, {"label_selector": {"zone": "x"}}, r"no node has zone = x \(there: none\)"),
        (
            1,
            {"accelerator_type": "L4", "label_selector": {"ray.io/market-type": "on-demand"}},
            r"on L4 on nodes labelled ray.io/market-type = on-demand.*room for 0 .*lower what train asks for",
        ),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(num_workers, needs, said):
    message = what_is_missing(NODES, num_workers, WorkerNeeds(cpus=1, gpus=1, **needs), "train")
    assert message and re.search(said, message), message


def test_workers_that_fit_miss_nothing():
    needs = WorkerNeeds(cpus=4, gpus=1, accelerator_type="H100", label_selector={"ray.io/market-type": "on-demand"})
    assert what_is_missing(NODES, 8, needs, "train") is None


def test_a_cluster_that_grows_is_trusted_with_what_it_does_not_tell():
    h100 = WorkerNeeds(cpus=1, gpus=1, accelerator_type="H100", label_selector={"ray.io/market-type": "spot"})
    assert not can_grow_to({}, 1, h100)
    assert can_grow_to({"CPU": 64, "GPU": 8}, 8, h100)
    assert not can_grow_to({"CPU": 64, "GPU": 8}, 9, h100)
    assert can_grow_to({"CPU": 64, "GPU": 8, "accelerator_type:H100": 2}, 8, h100)
    assert not can_grow_to({"CPU": 64, "GPU": 8, "accelerator_type:L4": 2}, 8, h100)
