"""How many workers fit on nodes, which are dictionaries like those of `ray.nodes()`."""

import re

import pytest
from ray._private.label_utils import validate_label_selector_value

from cluster.placement import (
    WorkerNeeds,
    can_grow_to,
    count_fitting,
    count_workers,
    explain_missing_resources,
    has_labels,
    parse_label_condition,
)

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
    assert sum(count_workers(node, WorkerNeeds(**needs)) for node in NODES) == room


@pytest.mark.parametrize(
    ("resource", "have", "amount", "count"),
    [
        *(("GPU", 1.0, 0.2, 5), ("GPU", 1.0, 0.1, 10), ("CPU", 1.0, 0.1, 10), ("CPU", 7.0, 0.07, 100)),
        *(("GPU", 8.0, 0.3, 24), ("GPU", 8.0, 2, 4), ("CPU", 8.0, 0.3, 26), ("GPU", 0, 0.5, 0)),
    ],
)
def test_parts_of_a_resource_are_counted_as_ray_counts_them(resource, have, amount, count):
    assert count_fitting(resource, have, amount) == count
    needs = WorkerNeeds(cpus=amount if resource == "CPU" else 0, gpus=amount if resource == "GPU" else 0)
    assert count_workers({"Resources": {resource: have}}, needs) == count
    assert can_grow_to({resource: have}, count, needs) and not can_grow_to({resource: have}, count + 1, needs)


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
def test_label_conditions_are_those_of_ray(condition, fitting):
    assert validate_label_selector_value(condition) is None
    nodes = {value: {"Labels": {"market": value} if value else {}} for value in ("spot", "on-demand", None)}
    assert {value for value, node in nodes.items() if has_labels(node, {"market": condition})} == fitting


@pytest.mark.parametrize("condition", ["-spot", "spot_", "in()", "in(spot,", "in(H100, TPU!GPU)", "!!!in(H100, TPU)"])
def test_a_condition_that_ray_would_refuse_is_refused_with_what_is_allowed(condition):
    assert validate_label_selector_value(condition)
    with pytest.raises(ValueError, match="label_selector: found market = .*expected a value"):
        parse_label_condition("market", condition)


@pytest.mark.parametrize(
    ("num_workers", "needs", "message"),
    [
        (
            3,
            {"accelerator_type": "L4"},
            r"3 workers of 1 CPU, 1 GPU each on L4.* fit on the Ray cluster: 2 .*Set train.num_workers to 2 or less",
        ),
        (1, {"accelerator_type": "A100"}, r"Set train.accelerator_type to an available type \(H100, L4\) or remove it"),
        (
            1,
            {"label_selector": {"team": "b"}},
            r"labelled team = b.*Change train.label_selector: no node has team = b \(values: a\)",
        ),
        (1, {"label_selector": {"zone": "x"}}, r"no node has zone = x \(values: none\)"),
        (
            1,
            {"accelerator_type": "L4", "label_selector": {"ray.io/market-type": "on-demand"}},
            r"on L4 on nodes labelled ray.io/market-type = on-demand.*on the Ray cluster: 0 .*Reduce the resources",
        ),
    ],
)
def test_missing_resources_are_explained_with_what_to_do(num_workers, needs, message):
    error = explain_missing_resources(NODES, num_workers, WorkerNeeds(cpus=1, gpus=1, **needs), "train")
    assert error and re.search(message, str(error)), error


def test_workers_that_fit_lack_nothing():
    needs = WorkerNeeds(cpus=4, gpus=1, accelerator_type="H100", label_selector={"ray.io/market-type": "on-demand"})
    assert explain_missing_resources(NODES, 8, needs, "train") is None


def test_an_autoscaler_is_trusted_with_what_it_does_not_report():
    h100 = WorkerNeeds(cpus=1, gpus=1, accelerator_type="H100", label_selector={"ray.io/market-type": "spot"})
    assert not can_grow_to({}, 1, h100)
    assert can_grow_to({"CPU": 64, "GPU": 8}, 8, h100)
    assert not can_grow_to({"CPU": 64, "GPU": 8}, 9, h100)
    assert can_grow_to({"CPU": 64, "GPU": 8, "accelerator_type:H100": 2}, 8, h100)
    assert not can_grow_to({"CPU": 64, "GPU": 8, "accelerator_type:L4": 2}, 8, h100)
