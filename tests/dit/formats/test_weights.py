"""Weights files from untrusted sources: no code in them is run, and what does not fit is listed."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dit.formats.weights import check_finite, check_weights, load_weights, read_weights
from raydit.errors import InvalidInput


class Malicious:
    """Calls a function of its choice when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("where", ["beside the weights", "in the arguments", "as a bare pickle"])
def test_a_malicious_pickle_runs_no_code_and_gives_one_clear_error(tmp_path, where):
    mark, file = tmp_path / "executed", tmp_path / "weights.pt"
    weights = {"x_embedder.proj.weight": torch.zeros(2)}
    if where == "beside the weights":
        torch.save({**weights, "more": Malicious(mark)}, file)
    elif where == "in the arguments":
        torch.save({"ema": weights, "args": argparse.Namespace(model=Malicious(mark))}, file)
    else:
        file.write_bytes(pickle.dumps({"more": Malicious(mark)}, protocol=2))
    with pytest.raises(ValueError, match=r"weights.pt refers to \S*open, which would run code") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value) and "safetensors" in str(caught.value)
    assert not mark.exists()
    if where == "as a bare pickle":  # the trap is real
        pickle.loads(file.read_bytes())["more"].close()
        assert mark.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_tensors_are_read_unchanged(tmp_path, name):
    weights = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16()}
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    read = read_weights(tmp_path / name)
    assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)


def test_a_file_in_torchs_format_before_zip_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pt")["a"].tolist() == [1, 1]


def test_arguments_of_a_training_checkpoint_are_read(tmp_path):
    torch.save({"args": argparse.Namespace(model="DiT-XL/2", num_classes=10)}, tmp_path / "0400000.pt")
    assert read_weights(tmp_path / "0400000.pt")["args"].model == "DiT-XL/2"
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["junk.pt", "junk.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all " * 10, b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*, expected a .safetensors or a PyTorch file"):
        read_weights(tmp_path / name)


def flip_a_bit(file, content):
    """Change one bit of a file in the middle of some bytes that it contains."""
    data = bytearray(file.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_pytorch_file_of_other_bytes_than_were_saved_is_refused(tmp_path, name):
    """One wrong bit in a tensor is still a tensor: only the checksums of the zip say so."""
    file, values = tmp_path / name, torch.randn(100, 100)
    torch.save({"a": torch.ones(3), "b": values}, file)
    assert torch.equal(read_weights(file)["b"], values)
    flip_a_bit(file, values.numpy().tobytes())
    with pytest.raises(
        InvalidInput, match=rf"{name} is damaged: found \S+/data/1 with bytes that do not match its checksum"
    ):
        read_weights(file)


def test_a_pytorch_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "weights.pt")["a"].tolist() == [1, 1, 1]


def test_a_list_and_a_missing_file_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"contains a list, expected a dict of tensors by name. Save the"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none.pt, expected a .safetensors or a PyTorch file"):
        read_weights(tmp_path / "none.pt")


def test_differing_names_are_listed_with_their_shapes():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3, device="meta")}
    check_weights(expected, {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError) as caught:
        check_weights(expected, {"a": torch.ones(4), "c": 5}, "A hint.")
    assert str(caught.value).splitlines() == [
        "these weights are of another model; 3 entries differ, the first:",
        "  b: found nothing, expected (3,)",
        "  c: found a int, expected nothing",
        "  a: found (4,), expected (2,)",
        "A hint.",
    ]


def test_weights_of_another_model_are_refused_with_the_first_differences():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    good = {name: value.clone() for name, value in network.state_dict().items()}
    assert load_weights(network, good) is network
    other = {**good, "0.weight": torch.zeros(2, 4), "9.weight": torch.zeros(1)}
    del other["1.bias"]
    with pytest.raises(ValueError) as caught:
        load_weights(network, other)
    assert str(caught.value).splitlines() == [
        "these weights are of another model; 3 entries differ, the first:",
        "  1.bias: found nothing, expected (2,)",
        "  9.weight: found (1,), expected nothing",
        "  0.weight: found (2, 4), expected (2, 3)",
    ]


def test_the_first_of_many_differing_weights_are_the_same_in_every_process():
    network = nn.Sequential(*[nn.Linear(1, 1) for _ in range(8)])
    other = {name: torch.zeros(5) for name in network.state_dict()}
    with pytest.raises(ValueError, match="16 entries differ") as caught:
        load_weights(network, other)
    listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert listed == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    weights = {"first": torch.ones(3), "counts": torch.arange(4), "second": torch.ones(2, 3, dtype=torch.bfloat16)}
    check_finite(weights, "a.pt")
    weights["second"][1, 1:] = value
    with pytest.raises(ValueError, match=r"a.pt: the tensor second is NaN or infinite in 2 of its 6 values, expected"):
        check_finite(weights, "a.pt")


def test_a_file_with_many_paths_to_one_list_is_read_at_once(tmp_path):
    """100 paths per level lead to the innermost tensor: 100^7 in 20 kB."""
    inner = [torch.zeros(1)]
    for _ in range(6):
        inner = [inner] * 100
    torch.save({"a": torch.ones(2), "more": inner}, tmp_path / "nested.pt")
    assert (tmp_path / "nested.pt").stat().st_size < 20_000
    assert read_weights(tmp_path / "nested.pt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        ({"nested": torch.ones(2)}, "no dense tensor"),
        (torch.ones(2).to_sparse(), "no dense tensor"),
    ],
)
def test_values_that_are_no_weights_by_themselves_are_refused_by_name(value, kind):
    with pytest.raises(
        InvalidInput, match=rf"a.pt: the tensor second is {kind}, expected one of float16, .* quantised"
    ):
        check_finite({"first": torch.ones(3), "second": value}, "a.pt")


@pytest.mark.parametrize("key", [0, 3, None, ("a", "b")])
def test_weights_without_names_are_refused(tmp_path, key):
    torch.save({"a": torch.ones(1), key: torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="adapter_model.bin contains a dict with the key .*, which is not a text"):
        read_weights(tmp_path / "adapter_model.bin")
