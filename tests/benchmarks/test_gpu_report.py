"""What benchmarks of GPUs compute from their measurements, and how they go on without a part."""

import itertools
import json

import pytest
import torch
from gpu_report import Figure, GpuReport, Part, busy_share, kind_of, read_trace
from gpu_training import batch_of, measure_training

from dit.config import DiTConfig
from dit.flow import FlowMatching
from dit.model import DiT


def test_overlapping_kernels_keep_a_gpu_busy_once():
    busy, gaps = busy_share([(10, 14), (0, 4), (2, 5), (3, 4), (16, 20)])
    assert busy == pytest.approx((5 + 4 + 4) / 20)
    assert gaps == [5, 2]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT", "matrix products"),
        ("void at::native::elementwise_kernel<128, 2>", "others"),
        ("void pytorch_flash::flash_bwd_kernel<cutlass::half_t>", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_3", "fused elementwise"),
        ("triton_per_fused__to_copy_add_cat_mul_native_layer_norm_backward_sum_view_5", "fused elementwise"),
        ("triton_red_fused__to_copy_lerp_gelu_backward_sum_view_2", "fused elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and averages"),
    ],
)
def test_kernels_have_kinds(kernel, kind):
    assert kind_of(kernel) == kind


def test_only_work_of_the_gpu_is_read_from_a_trace(tmp_path):
    kernel = {"cat": "kernel", "name": "a", "ts": 1.0, "dur": 2.0}
    annotation = {"cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 0.0, "dur": 9.0}
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [kernel, annotation, {"ph": "M"}]}))
    assert read_trace(tmp_path / "trace.json") == [kernel]


def test_parts_that_fail_or_do_not_fit_leave_the_others(tmp_path):
    def measure(value):
        yield Figure(what=f"figure {value}", value=value, product=4e12, share=0.5, target=0.7)

    def missing():
        raise ModuleNotFoundError("No module named 'x'", name="x.y")
        yield

    def broken():
        yield from measure(2.0)
        raise ZeroDivisionError("what it was")

    parts = {"first": Part(0, lambda: measure(1.0)), "absent": Part(0, missing, needs="x"), "long": Part(1e9, broken)}
    report = GpuReport(tmp_path, "report", {"device": "card"})
    report.run(parts, 1e6)
    assert not report.failed
    report.run({"broken": Part(0, broken), "last": Part(0, lambda: measure(3.0))}, 1e6)
    assert report.failed
    content = json.loads((tmp_path / "report.json").read_text())
    assert [figure["value"] for figure in content["figures"]] == [1.0, None, None, 2.0, None, 3.0]
    table = (tmp_path / "report.md").read_text()
    assert "| figure 1.0 | 1 | 4 TFLOP/s | 0.50 | 0.7 |  |" in table
    assert "failed: ZeroDivisionError: what it was" in table and "left out: No module named 'x'" in table


def test_a_training_that_has_no_time_left_is_measured_until_its_first_report():
    config = DiTConfig(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    process, cpu = FlowMatching(), torch.device("cpu")
    batches = itertools.repeat(batch_of(config, 2, process))
    found = measure_training(DiT(config), batches, process, cpu, size=2, window=2, seconds=0.0, dtype="float32")
    assert found.state.step == 2 and found.images_per_second > 0 and found.first_seconds > 0
