"""Adapters in peft's layout, without peft: written, read, merged and refused. `test_lora` compares with peft itself."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dit.config import named_config
from dit.formats.adapter import AdapterWeights, Factors, merge_adapters, read_adapter, write_adapter
from dit.formats.adapter_diffusers import adapter_from_diffusers
from dit.formats.weights import load_weights
from dit.lora import adapter_config
from dit.model import build_model, meta_state
from raydit.errors import InvalidInput

FILE = "adapter_model.safetensors"


@pytest.fixture
def written(small_model, tmp_path):
    """written(targets, **fields of the model): a network, its weights, and the folder of a random adapter of it."""

    def make(targets=("attention",), rank=3, alpha=5.0, name="adapter", **fields):
        base = small_model(**fields)
        # Smaller, so that rounding is not amplified from block to block.
        weights = {key: value if key == "pos_embed" else value / 2 for key, value in base.state_dict().items()}
        network = load_weights(build_model(base.config), weights)
        config = adapter_config(network, rank=rank, alpha=alpha, targets=targets)
        generator = torch.Generator().manual_seed(1)
        factors = {}
        for layer in config.layers:
            rows, columns = weights[f"{layer}.weight"].shape
            factors[f"{layer}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=generator)
            factors[f"{layer}.lora_B.weight"] = 0.2 * torch.randn(rows, rank, generator=generator)
        write_adapter(tmp_path / name, config, factors)
        return network, weights, tmp_path / name

    return make


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
    ({"architecture": "uvit"}, ("attention", "*.skip_linear")),
]


@pytest.mark.parametrize(("fields", "targets"), MODELS, ids=str)
def test_merged_weights_compute_what_layers_with_factors_do(written, fields, targets):
    """The factors are applied to the inputs of each layer, as the paper has it."""
    network, base, folder = written(targets, **fields)
    before, adapter = outputs(network), read_adapter(folder)

    def add(pair):
        return lambda layer, x, out: out + 5 / 3 * F.linear(F.linear(x[0], pair.down), pair.up)

    hooks = [network.get_submodule(name).register_forward_hook(add(pair)) for name, pair in adapter.factors.items()]
    after = outputs(network)
    assert len(hooks) == len(adapter.factors) and (after - before).abs().max() > 1e-4
    merged = merge_adapters(base, [(adapter, 1.0)])
    assert merged.keys() == base.keys()
    torch.testing.assert_close(outputs(load_weights(build_model(network.config), merged)), after, atol=1e-5, rtol=1e-5)


def test_alpha_zero_changes_nothing_to_the_bit(written):
    _, base, folder = written(("attention", "mlp"), alpha=0.0)
    base["blocks.0.attn.qkv.weight"][0, 0] = -0.0
    merged = merge_adapters(base, [(read_adapter(folder), 1.0)])
    assert all(value.numpy().tobytes() == base[name].numpy().tobytes() for name, value in merged.items())


def test_a_mixture_adds_the_changes_by_their_shares():
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(4, 3), "b": torch.randn(2)}

    def adapter(**full):
        return AdapterWeights({"a": Factors(torch.randn(2, 3), torch.randn(4, 2), 0.5)}, full)

    one, other = adapter(), adapter()
    mixed = merge_adapters(base, [(one, 0.25), (other, 0.5)])
    changes = [0.5 * pair.up @ pair.down for pair in (one.factors["a"], other.factors["a"])]
    torch.testing.assert_close(mixed["a.weight"], base["a.weight"] + 0.25 * changes[0] + 0.5 * changes[1])
    assert torch.equal(mixed["b"], base["b"])
    row, longer = torch.tensor([1.0, 2.0]), torch.arange(3.0)
    assert torch.equal(merge_adapters(base, [(adapter(b=longer), 1.0)])["b"], longer)
    mixed = merge_adapters(base, [(adapter(b=longer), 0.25), (adapter(b=longer + 1), 0.75)])
    torch.testing.assert_close(mixed["b"], longer + 0.75)
    for parts, message in (
        ([(adapter(b=row), 0.5)], "found b, which is trained in full, with shares of sum 0.5"),
        ([(adapter(b=row), 0.5), (adapter(b=row), 0.75)], "with shares of sum 1.25"),
        ([(adapter(b=row), 0.5), (adapter(), 0.5)], "found b, which is trained in full, not alike in all adapters"),
        ([(adapter(b=row), 0.5), (adapter(b=longer), 0.5)], "not alike in all adapters"),
    ):
        with pytest.raises(InvalidInput, match=message):
            merge_adapters(base, parts)


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"targets": ("convolution",)}, "train.lora.targets: found 'convolution', which matches none"),
        ({}, {"targets": ("blocks.{1..2}.*",)}, "train.lora.targets: found 'blocks.2.\\*'"),
        ({"architecture": "uvit"}, {"targets": ("modulation",)}, "'modulation', which matches no layer of this model"),
        ({}, {"rank": 33}, "train.lora.rank: found 33, expected at most 32"),
        ({}, {"full": [f"blocks.{b}.attn.{p}.weight" for b in (0, 1) for p in ("qkv", "proj")]}, "trained in full"),
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
        ({"lora_alpha": "inf"}, "found lora_alpha 'inf' and rank 3"),
        ({"lora_alpha": "many"}, "found lora_alpha 'many'"),
        ({"alpha_pattern": [1]}, "found lora_alpha .1."),
        ({"use_bdlora": {"nblocks": 2}}, "found BD-LoRA"),
        ({"kasa_config": {"beta": 1e-4}}, "found KaSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', by which peft changed .*path_initial_model"),
        ({"init_lora_weights": "olora"}, "'olora', by which peft changed"),
    ],
)
def test_another_kind_of_adapter_is_refused(written, changes, message):
    _, _, folder = written()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InvalidInput, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("initialisation", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_read_as_any_other(written, initialisation):
    _, base, folder = written()
    expected = merge_adapters(base, [(read_adapter(folder), 1.0)])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": initialisation}))
    found = merge_adapters(base, [(read_adapter(folder), 1.0)])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_files_of_an_adapter_that_are_wrong_are_refused(written, tmp_path):
    _, base, folder = written()
    file = folder / FILE
    tensors = load_file(file)
    first = min(tensors)
    cases = {
        "without lora_A": {name: value for name, value in tensors.items() if name != first},
        "of the shapes": {**tensors, first: torch.zeros(2, 32)},
        "NaN or infinite": {**tensors, first: tensors[first] * float("nan")},
        "found no factors": {"x": torch.zeros(1)},
        "is int8": {**tensors, first: tensors[first].to(torch.int8)},
    }
    for message, content in cases.items():
        save_file(content, file)
        with pytest.raises(InvalidInput, match=message):
            read_adapter(folder)
    save_file(tensors, file)
    lacking = {name: value for name, value in base.items() if "blocks.1.attn.proj" not in name}
    with pytest.raises(InvalidInput, match=r"changes blocks.1.attn.proj.weight .*no such tensor"):
        merge_adapters(lacking, [(read_adapter(folder), 1.0)])
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"without adapter_config.json"):
        read_adapter(folder)
    with pytest.raises(FileNotFoundError, match="found no adapter"):
        read_adapter(tmp_path)


def test_a_checkpoint_of_rank_16_on_the_attention_of_xl_2_takes_50_megabytes():
    with torch.device("meta"):
        network = build_model(named_config("DiT-XL/2"))
    config = adapter_config(network, rank=16, alpha=16.0, targets=("attention",))
    shapes = meta_state(named_config("DiT-XL/2"))
    trained = sum(16 * sum(shapes[f"{layer}.weight"].shape) for layer in config.layers)
    assert trained == 28 * 16 * ((1152 + 3 * 1152) + (1152 + 1152)) == 3_096_576
    # Weights, average and AdamW's two moments in float32.
    assert 4 * 4 * trained == 49_545_216


def test_no_name_of_the_head_is_mistaken_for_one_of_the_trunk(written):
    for targets, ambiguous in ((("blocks.*.attn.qkv",), True), (("attention",), False)):
        _, _, folder = written(targets, name=str(ambiguous), head_width=32, head_depth=1)
        found = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert isinstance(found, str) == ambiguous
        assert ("head.blocks.0.attn.qkv" in found) != ambiguous


def test_a_file_of_diffusers_is_scaled_as_its_header_says(written, tmp_path):
    from diffusers.loaders.lora_base import LoraBaseMixin

    _, _, folder = written()
    tensors = {name.removeprefix("base_model.model."): value for name, value in load_file(folder / FILE).items()}

    def scales(header):
        state = {f"transformer.{name}": value for name, value in tensors.items()}
        options = {"is_main_process": True, "weight_name": None, "save_function": None, "safe_serialization": True}
        LoraBaseMixin.write_lora_layers(state, tmp_path / "theirs", **options, lora_adapter_metadata=header)
        return {name: pair.scale for name, pair in read_adapter(tmp_path / "theirs").factors.items()}

    def prefixed(**config):
        return {f"transformer.{name}": value for name, value in config.items()} | {"text_encoder.lora_alpha": 99}

    first, *others = (name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name)
    assert set(scales(None).values()) == {1.0}
    assert set(scales(prefixed(r=3, lora_alpha=6)).values()) == {2.0}
    assert set(scales(prefixed(lora_alpha=6, use_rslora=True)).values()) == {6 / math.sqrt(3)}
    assert set(scales({"lora_alpha": 6, "use_rslora": False}).values()) == {2.0}  # as save_lora_adapter writes it
    found = scales(prefixed(lora_alpha=6, alpha_pattern={first: 12}))
    assert found == {first: 4.0, **dict.fromkeys(others, 2.0)}
    for config, message in (({"use_dora": True}, "found DoRA"), ({"lora_alpha": "many"}, "found lora_alpha 'many'")):
        with pytest.raises(InvalidInput, match=message):
            scales(prefixed(**config))


@pytest.mark.parametrize("header", ["[1]", "{", "5", "[" * 100_000])
def test_a_header_that_is_no_config_is_refused(written, header):
    _, _, folder = written()
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(folder / FILE), file, {"format": "pt", "lora_adapter_metadata": header})
    (folder / FILE).unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        InvalidInput, match="weights.safetensors: found lora_adapter_metadata .* expected a JSON object"
    ):
        read_adapter(folder)


def test_an_adapter_of_another_width_in_the_names_of_diffusers_is_refused():
    pair = Factors(torch.ones(2, 16), torch.ones(16, 2), 1.0)
    for parts in ("qkv", "q"):
        adapter = AdapterWeights({f"transformer_blocks.0.attn1.to_{letter}": pair for letter in parts}, {})
        with pytest.raises(
            InvalidInput, match=r"another model: .*to_q \(16, 16\), expected \(32, 32\), as the base has"
        ):
            adapter_from_diffusers(adapter, 1, 32)
    different = {"to_q": pair, "to_k": Factors(torch.ones(2, 32), torch.ones(32, 2), 1.0)}
    with pytest.raises(InvalidInput, match="an adapter of another model"):
        adapter_from_diffusers(
            AdapterWeights({f"transformer_blocks.0.attn1.{name}": each for name, each in different.items()}, {}), 1, 32
        )
