"""Low-rank adapters: equal to peft's layers, merged and unmerged, and nothing else is trained."""

import pytest
import torch
from safetensors.torch import load_file

from dit.config import named_config
from dit.formats.adapter import AdapterConfig, AdapterWeights, Factors, merge_adapters, read_adapter, write_adapter
from dit.formats.weights import load_weights
from dit.lora import adapter_config, add_adapter, load_adapter, trained_weights
from dit.model import DiT, build_model
from raydit.errors import InvalidInput

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(small_model):
    """adapted(**fields of the model): a network with random factors, its base's weights, and the adapter's config."""

    def make(targets=("attention",), rank=3, alpha=5.0, full=(), **fields):
        base = small_model(**fields)
        # Smaller, so that rounding is not amplified from block to block.
        weights = {name: value if name == "pos_embed" else value / 2 for name, value in base.state_dict().items()}
        network = load_weights(build_model(base.config), weights)
        config = adapter_config(network, rank=rank, alpha=alpha, targets=targets, full=full)
        add_adapter(network, config)
        return network, weights, config

    return make


def randomise(network, config):
    """Give what is trained other values, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trained_weights(network.state_dict(), config).values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def write(network, config, folder):
    write_adapter(folder, config, {name: value.clone() for name, value in trained_of(network, config).items()})
    return folder


def trained_of(network, config):
    return trained_weights(network.state_dict(), config)


def outputs(network):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, *network.config.latent_size, generator=generator)
    labels = torch.tensor([1, 9]) if network.config.num_classes else None
    with torch.no_grad():
        return network(x, torch.tensor([3, 990]), labels)


MODELS = [
    ({}, ("attention",)),
    ({}, ("attention", "mlp", "modulation")),
    ({}, ("blocks.{0..1}.mlp.*", "final_layer.linear")),
    ({"conditioning": "cross_attention"}, ("attention",)),
    ({"conditioning": "in_context", "mlp": "swiglu"}, ("mlp",)),
    ({"head_width": 32, "head_depth": 1}, ("blocks.*.attn.*",)),
    ({"head_width": 32, "head_depth": 1}, ("attention", "modulation")),
    ({"architecture": "uvit"}, ("attention", "*.skip_linear")),
]


@pytest.mark.parametrize(("fields", "targets"), MODELS, ids=str)
def test_merged_weights_compute_what_the_adapted_network_does(adapted, tmp_path, fields, targets):
    network, base, config = adapted(targets, **fields)
    before = outputs(network)
    randomise(network, config)
    after = outputs(network)
    assert (after - before).abs().max() > 1e-4
    merged = merge_adapters(base, [(read_adapter(write(network, config, tmp_path / "a")), 1.0)])
    assert merged.keys() == base.keys()
    torch.testing.assert_close(outputs(load_weights(build_model(network.config), merged)), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("fields", "targets"), MODELS, ids=str)
def test_peft_loads_a_written_adapter_and_computes_and_merges_the_same(adapted, tmp_path, fields, targets):
    network, base, config = adapted(targets, **fields)
    randomise(network, config)
    folder = write(network, config, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_weights(build_model(network.config), base), folder)
    assert torch.equal(outputs(theirs), outputs(network))
    merged = theirs.merge_and_unload().state_dict()
    ours = merge_adapters(base, [(read_adapter(folder), 1.0)])
    assert merged.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)
        changed = any(name == f"{layer}.weight" for layer in config.layers)
        assert torch.equal(value, base[name]) != changed


def test_an_adapter_that_peft_saved_is_read_as_the_same(small_model, tmp_path):
    model = small_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv", "fc1"], alpha_pattern={"fc1": 3}, rank_pattern={"fc1": 2},
        use_rslora=True, init_lora_weights=False, modules_to_save=["embedding_table"],
    )  # fmt: skip
    theirs = peft.get_peft_model(load_weights(DiT(model.config), base), settings)
    with torch.no_grad():
        theirs.base_model.model.y_embedder.embedding_table.modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path)
    merged = merge_adapters(base, [(read_adapter(tmp_path), 1.0)])
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)
    assert torch.equal(merged["y_embedder.embedding_table.weight"], 2 * base["y_embedder.embedding_table.weight"])


def test_nothing_but_the_adapter_is_trained(adapted):
    full = ("y_embedder.embedding_table.weight",)
    network, _, config = adapted(("attention",), full=full)
    outputs_of = network(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))
    outputs_of.square().mean().backward()
    graded = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained_of(network, config).keys() == {
        f"{layer}.lora_{factor}.weight" for layer in config.layers for factor in "AB"
    } | {*full}
    assert config.layers == tuple(f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("qkv", "proj"))


def test_a_new_adapter_and_one_of_alpha_zero_change_nothing_to_the_bit(adapted, tmp_path):
    network, base, config = adapted(("attention", "mlp"))
    base["blocks.0.attn.qkv.weight"][0, 0] = -0.0
    fresh = merge_adapters(base, [(read_adapter(write(network, config, tmp_path / "fresh")), 1.0)])
    network, _, config = adapted(("attention", "mlp"), alpha=0.0)
    randomise(network, config)
    silent = merge_adapters(base, [(read_adapter(write(network, config, tmp_path / "silent")), 1.0)])
    for merged in (fresh, silent):
        assert all(value.numpy().tobytes() == base[name].numpy().tobytes() for name, value in merged.items())


def test_a_mixture_adds_the_changes_by_their_shares():
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(4, 3), "b": torch.randn(2)}

    def adapter(**full):
        return AdapterWeights({"a": Factors(torch.randn(2, 3), torch.randn(4, 2), 0.5)}, full)

    one, other = adapter(b=torch.tensor([1.0, 2.0])), adapter()
    mixed = merge_adapters(base, [(one, 0.25), (other, 0.5)])
    expected = base["a.weight"] + 0.25 * one.factors["a"].change() + 0.5 * other.factors["a"].change()
    torch.testing.assert_close(mixed["a.weight"], expected.float())
    torch.testing.assert_close(mixed["b"], 0.25 * torch.tensor([1.0, 2.0]) + 0.75 * base["b"])
    other_shape = AdapterWeights(one.factors, {"b": torch.zeros(3)})
    assert torch.equal(merge_adapters(base, [(other_shape, 1.0)])["b"], torch.zeros(3))
    torch.testing.assert_close(merge_adapters(base, [(other_shape, 0.5), (other_shape, 0.5)])["b"], torch.zeros(3))
    with pytest.raises(InvalidInput, match="found b in other shapes"):
        merge_adapters(base, [(other_shape, 0.5)])


def test_an_adapter_is_loaded_into_a_network_and_its_average(adapted, tmp_path):
    network, _, config = adapted()
    randomise(network, config)
    folder = write(network, config, tmp_path / "adapter")
    again, _, _ = adapted()
    load_adapter(again.state_dict(), config, read_adapter(folder))
    assert torch.equal(outputs(again), outputs(network))
    with pytest.raises(InvalidInput, match="of another model"):
        load_adapter(again.state_dict(), config, AdapterWeights({}, {}))


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"targets": ("convolution",)}, "train.lora.targets: found 'convolution', which matches none"),
        ({}, {"targets": ("blocks.{1..2}.*",)}, "train.lora.targets: found 'blocks.2.\\*'"),
        ({"architecture": "uvit"}, {"targets": ("modulation",)}, "'modulation', which this model has no layers of"),
        ({}, {"rank": 33}, "train.lora.rank: found 33, expected at most 32"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(small_model, fields, settings, message):
    with pytest.raises(InvalidInput, match=message):
        adapter_config(small_model(**fields), **{"rank": 2, "alpha": 1.0, "targets": ("attention",), **settings})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of the kind LOHA, expected low-rank factors alone"),
        ({"use_dora": True}, "found DoRA"),
        ({"bias": "all"}, "found trained biases"),
        ({"fan_in_fan_out": True}, r"weights stored as \(in, out\)"),
        ({"lora_alpha": "inf"}, "found the scale inf"),
    ],
)
def test_another_kind_of_adapter_is_refused(adapted, tmp_path, changes, message):
    import json

    network, _, config = adapted()
    folder = write(network, config, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InvalidInput, match=message):
        read_adapter(folder)


def test_files_of_an_adapter_that_are_wrong_are_refused(adapted, tmp_path):
    network, base, config = adapted()
    folder = write(network, config, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(sorted(tensors)))
    cases = {
        "without lora_A": {name: value for name, value in tensors.items() if name != first},
        "of the shapes": {**tensors, first: torch.zeros(2, 32)},
        "NaN or infinite": {**tensors, first: tensors[first] * float("nan")},
        "found no factors": {"x": torch.zeros(1)},
        "is int8": {**tensors, first: tensors[first].to(torch.int8)},
    }
    from safetensors.torch import save_file

    for message, content in cases.items():
        save_file(content, folder / "adapter_model.safetensors")
        with pytest.raises(InvalidInput, match=message):
            read_adapter(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidInput, match="changes blocks.1.attn.proj.weight .*no such tensor"):
        merge_adapters({name: value for name, value in base.items() if "blocks.1.attn.proj" not in name},
                       [(read_adapter(folder), 1.0)])  # fmt: skip
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="without adapter_config.json"):
        read_adapter(folder)
    with pytest.raises(FileNotFoundError, match="found no adapter"):
        read_adapter(tmp_path)


def test_a_checkpoint_of_rank_16_on_the_attention_of_xl_2_takes_50_megabytes():
    with torch.device("meta"):
        network = build_model(named_config("DiT-XL/2"))
        add_adapter(network, adapter_config(network, rank=16, alpha=16.0, targets=("attention",)))
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert trained == 28 * 16 * ((1152 + 3 * 1152) + (1152 + 1152)) == 3_096_576
    # Weights, average and AdamW's two moments in float32.
    assert 4 * 4 * trained == 49_545_216


def test_no_name_of_the_head_is_mistaken_for_one_of_the_trunk(tmp_path):
    import json

    for layers, ambiguous in ((("blocks.0.a",), True), (("blocks.0.a", "head.blocks.0.a"), False)):
        config = AdapterConfig(rank=1, alpha=1.0, layers=layers, ambiguous=ambiguous)
        weights = {f"{name}.lora_{factor}.weight": torch.ones(1, 1) for name in layers for factor in "AB"}
        write_adapter(tmp_path / str(ambiguous), config, weights)
        written = json.loads((tmp_path / str(ambiguous) / "adapter_config.json").read_text())["target_modules"]
        assert written == (r"blocks\.0\.a" if ambiguous else list(layers))
