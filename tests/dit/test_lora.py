"""Low-rank adapters: equal to peft's layers, merged and unmerged, and nothing else is trained."""

import pytest
import torch

from dit.formats.adapter import AdapterWeights, merge_adapters, read_adapter, write_adapter
from dit.formats.adapter_diffusers import adapter_for_diffusers, adapter_from_diffusers, written_form
from dit.formats.diffusers_weights import to_diffusers
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


def test_an_adapter_is_loaded_into_a_network_and_its_average(adapted, tmp_path):
    network, _, config = adapted()
    randomise(network, config)
    folder = write(network, config, tmp_path / "adapter")
    again, _, _ = adapted()
    load_adapter(again.state_dict(), config, read_adapter(folder))
    assert torch.equal(outputs(again), outputs(network))
    with pytest.raises(InvalidInput, match="of another model"):
        load_adapter(again.state_dict(), config, AdapterWeights({}, {}))


def test_diffusers_computes_the_same_with_an_adapter_in_its_names(adapted, tmp_path):
    from diffusers import DiTTransformer2DModel

    targets = ("attention", "mlp", "modulation", "t_embedder.mlp.0")
    network, base, config = adapted(targets, timestep_frequency_shift=1)
    randomise(network, config)
    adapter = read_adapter(write(network, config, tmp_path / "ours"))
    theirs, tensors = written_form(adapter_for_diffusers(adapter, network.config.depth))
    write_adapter(tmp_path / "theirs", theirs, tensors)
    fields, state = to_diffusers(network.config, base)
    transformer = DiTTransformer2DModel(**fields)
    transformer.load_state_dict(state, strict=False)
    transformer = peft.PeftModel.from_pretrained(transformer, tmp_path / "theirs").eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 990]), torch.tensor([1, 9])
    with torch.no_grad():
        found, expected = transformer(x, timestep=t, class_labels=y).sample, network.eval()(x, t, y)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    back = adapter_from_diffusers(read_adapter(tmp_path / "theirs"), network.config.depth, network.config.hidden_size)
    assert back.factors.keys() == adapter.factors.keys()
    for name, pair in adapter.factors.items():
        assert torch.equal(back.factors[name].down, pair.down) and torch.equal(back.factors[name].up, pair.up)
