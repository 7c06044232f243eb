"""The table of accelerators, and the names by which CUDA and users call them."""

import pytest

from dit.hardware.accelerators import ACCELERATORS, accelerator_named, known_accelerator


@pytest.mark.parametrize(
    ("cuda", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_tells(cuda, key):
    assert known_accelerator(cuda) is ACCELERATORS[key]


def test_a_device_that_is_not_known_is_none_and_refused_by_name():
    for cuda in (
        "AMD Instinct MI300X",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "NVIDIA T400 4GB",
        "NVIDIA GB200",
        "NVIDIA A1000",
    ):
        assert known_accelerator(cuda) is None
    assert accelerator_named("h100 pcie") == "H100 PCIe"
    with pytest.raises(ValueError, match="'H10', expected one of .*did you mean H100"):
        accelerator_named("H10")
