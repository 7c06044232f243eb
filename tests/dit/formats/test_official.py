"""Official weights files: equal outputs, recognition of the model, and refusal of other files."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from dit.checkpoint import (
    export_official,
    import_official,
    load_checkpoint,
    restore,
    verify_checkpoint,
)
from dit.config import MODEL_NAMES, UVIT_NAMES, DiTConfig, UViTConfig, named_config
from dit.flow import FlowMatching
from dit.formats.official import looks_like, published_objective, recognise
from dit.model import DiT, meta_state
from dit.samplers import sample_euler
from dit.schedule import TrainingConfig
from dit.train import create_state
from raydit.errors import InvalidInput

T, Y = torch.tensor([3, 990]), torch.tensor([1, 9])


@pytest.fixture
def imported(tmp_path, tiny_autoencoder):
    """imported(content, name): save content as an official file, and import it as a checkpoint."""

    def make(content, name="weights.pt", **known):
        torch.save(content, tmp_path / name)
        folder = tmp_path / f"{name} imported"
        return import_official(tmp_path / name, folder, autoencoder=str(tiny_autoencoder), **{"num_heads": 4, **known})

    return make


def test_an_imported_dit_computes_the_same_as_the_official_code(imported, rebuilt, golden):
    io = golden("dit_a.io.safetensors")
    checkpoint = imported(golden("dit_a.state_dict.safetensors"))
    with torch.no_grad():
        out = rebuilt(checkpoint)(io["x"], io["t"], io["y"])
    torch.testing.assert_close(out, io["out"], atol=1e-5, rtol=0)
    assert checkpoint.config["model"] == {**checkpoint.config["model"], **golden("configs.json")["dit_a"]}


def test_an_imported_uvit_computes_the_same_as_the_official_code_with_timesteps_from_one(imported, rebuilt, golden):
    io = golden("uvit_a.io.safetensors")
    checkpoint = imported(golden("uvit_a.state_dict.safetensors"), name="nnet_ema.pth")
    with torch.no_grad():
        out = rebuilt(checkpoint)(io["x"], io["t"] - 1, io["y"])
    torch.testing.assert_close(out, io["out"], atol=1e-5, rtol=0)
    assert checkpoint.config["objective"]["schedule"] == "scaled_linear"
    assert checkpoint.config["model"]["num_classes"] == 10


def test_imported_sit_weights_sample_as_the_official_code_does(imported, rebuilt, golden):
    expected = golden("sit_linear.safetensors")
    checkpoint = imported(golden("dit_a.state_dict.safetensors"), objective="flow")
    ours = sample_euler(rebuilt(checkpoint), expected["z"], expected["z_y"], process=FlowMatching(), steps=10)
    theirs = expected["ode.euler.num_steps11"]
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), atol=1e-5, rtol=0)
    assert checkpoint.record.process_kind == "flow"


def test_imported_repa_weights_compute_the_same_in_times_that_run_from_noise_to_data(imported, rebuilt, golden):
    """REPA calls its model at the noise level, and it returns noise - data; its projectors take no part in samples."""
    weights, io = golden("dit_a.state_dict.safetensors"), golden("dit_a.io.safetensors")
    projectors = {f"projectors.0.{index}.weight": torch.randn(8, 8) for index in (0, 2, 4)}
    checkpoint = imported({"model": weights | projectors, "ema": weights | projectors, "steps": 3}, objective="flow")
    level = torch.rand(len(io["x"]))
    with torch.no_grad():
        plain = rebuilt(imported(weights, "plain.pt", objective="flow"))(io["x"], level, io["y"])
        torch.testing.assert_close(rebuilt(checkpoint)(io["x"], 1 - level, io["y"]), -plain, atol=1e-5, rtol=1e-5)
    assert "projectors" in checkpoint.config["source"]["taken"]
    with pytest.raises(InvalidInput, match="objective is 'diffusion'"):
        imported({"ema": weights | projectors}, "other.pt")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "out.pt"),
        ({}, "out"),
        ({}, "out.safetensors"),
        ({"conditioning": "adaln"}, "out.pt"),
        ({"conditioning": "cross_attention"}, "out.pt"),
        ({"conditioning": "in_context"}, "out.pt"),
        ({"learn_sigma": False, "in_channels": 4, "patch_size": 4, "mlp_ratio": 2.0}, "out.pt"),
        ({"num_classes": 0}, "out.pt"),
        ({"input_size": (4, 16), "depth": 11}, "out.safetensors"),
        ({"architecture": "uvit", "first_timestep": 1}, "out.pt"),
        ({"architecture": "uvit", "first_timestep": 1, "qkv_bias": True, "mlp_time_embed": True}, "out.pt"),
        ({"architecture": "uvit", "first_timestep": 1, "final_conv": False}, "out.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())) or "adaln_zero",
)
def test_export_to_official_and_import_change_nothing(fields, name, small_model, save_model, tmp_path, rebuilt):
    model = small_model(**fields)
    ours = save_model(model, objective=published_objective(model.config))
    file = export_official(ours, tmp_path / name)
    back = import_official(file, tmp_path / "back", num_heads=4, autoencoder=ours.config["autoencoder"]["id"])
    assert (back.config["model"], back.config["objective"]) == (ours.config["model"], ours.config["objective"])
    for which in ("ema", "model"):
        assert all(torch.equal(value, ours.weights("ema")[key]) for key, value in back.weights(which).items())
    x = torch.randn(2, 4, *model.config.latent_size)
    y = Y if model.config.num_classes else None
    with torch.no_grad():
        assert torch.equal(rebuilt(back)(x, T, y), rebuilt(ours)(x, T, y))
        raw = export_official(ours, tmp_path / f"raw {name}", weights="raw")
        trained = import_official(raw, tmp_path / "trained", num_heads=4, autoencoder=ours.config["autoencoder"]["id"])
        assert torch.equal(rebuilt(trained)(x, T, y), model(x, T, y))


def test_an_exported_file_is_a_plain_state_dict(small_model, save_model, tmp_path):
    model = small_model()
    weights = torch.load(export_official(save_model(model), tmp_path / "out.pt"), weights_only=True)
    DiT(model.config).load_state_dict(weights)


def test_num_classes_tells_a_label_table_without_null_row(imported, small_model):
    model = small_model(num_classes=10, class_dropout_prob=0.0)
    assert imported(model.state_dict(), num_classes=10).config["model"]["class_dropout_prob"] == 0.0
    assert imported(model.state_dict(), "other.pt").config["model"]["num_classes"] == 9


def test_both_weights_step_and_seed_of_a_training_checkpoint_are_imported(imported, small_model):
    trained = small_model().state_dict()
    averaged = {name: value / 2 for name, value in trained.items()}
    content = {"model": trained, "ema": averaged, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    arguments = argparse.Namespace(model="DiT-of-my-own", global_seed=5, num_classes=10)
    checkpoint = imported({**content, "args": arguments}, "0400000.pt")
    assert (checkpoint.step, checkpoint.config["seed"]) == (400_000, 5)
    for which, expected in (("model", trained), ("ema", averaged)):
        assert all(torch.equal(value, expected[name]) for name, value in checkpoint.weights(which).items())


def test_half_precision_weights_are_imported_as_float32(imported, small_model):
    model = small_model().bfloat16()
    weights = imported(model.state_dict()).weights()
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert torch.equal(weights["blocks.0.mlp.fc1.weight"], model.state_dict()["blocks.0.mlp.fc1.weight"].float())


def test_the_published_xl_2_is_recognised_by_its_names(golden):
    weights = {name: torch.empty(shape, device="meta") for name, shape in golden("dit_xl2_keys.json").items()}
    assert looks_like(weights) == "DiT-XL/2"
    assert recognise(weights) == recognise(weights, "DiT-XL/2") == named_config("DiT-XL/2") == DiTConfig()


@pytest.mark.parametrize("name", [*MODEL_NAMES, *UVIT_NAMES])
def test_every_named_size_is_recognised(name):
    config = named_config(name, num_classes=17, **({"first_timestep": 1} if name in UVIT_NAMES else {}))
    weights = meta_state(config)
    assert looks_like(weights) == name
    assert recognise(weights) == recognise(weights, name) == config


def test_weights_of_another_size_are_refused_with_what_they_look_like(imported):
    shapes = meta_state(named_config("DiT-S/4"))
    with pytest.raises(ValueError) as caught:
        imported({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, model="DiT-S/2", num_heads=6)
    assert str(caught.value).splitlines() == [
        "these weights are of another model; 3 entries differ, the first:",
        "  final_layer.linear.bias: found (128,), expected (32,)",
        "  final_layer.linear.weight: found (128, 384), expected (32, 384)",
        "  x_embedder.proj.weight: found (384, 4, 4, 4), expected (384, 4, 2, 2)",
        "The weights look like DiT-S/4.",
    ]


def test_an_extra_name_is_refused(imported, small_model):
    with pytest.raises(
        ValueError, match=r"1 entries differ, the first:\n  more: found \(2,\), expected nothing\nThe w"
    ):
        imported({**small_model().state_dict(), "more": torch.zeros(2)})


def test_num_heads_must_be_given_for_a_size_without_a_name(small_model):
    with pytest.raises(ValueError, match=r"look like a DiT of no named size \(depth 2, hidden_size 32, .* Give num_h"):
        recognise(small_model().state_dict())


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}, "epoch": 3}, {"conv1.weight": torch.zeros(2, 2)}, {"x_embedder.proj.weight": 1}]
)
def test_weights_of_other_networks_are_refused_with_their_first_names(imported, content):
    first = next(iter(sorted(content)), "nothing")
    with pytest.raises(
        ValueError, match=rf"neither those of a DiT nor of a U-ViT: found {first}.*, expected official names"
    ):
        imported(content)


def test_an_imported_checkpoint_is_complete_and_cannot_be_resumed(imported, small_model):
    checkpoint = imported(small_model().state_dict())
    verify_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint.path) == checkpoint
    files = {file.relative_to(checkpoint.path).as_posix() for file in checkpoint.path.rglob("*") if file.is_file()}
    assert files == {"config.json", "model.safetensors", "ema.safetensors", "COMPLETE"}
    config = checkpoint.config
    assert (config["recipe"], config["latents_fingerprint"], config["step"]) == (None, None, 0)
    assert config["source"] == {"format": "official", "name": "weights.pt"}
    assert config["class_names"] == [str(label) for label in range(10)]
    with pytest.raises(ValueError, match=r"imported, .* weights only: found no trainer/, expected the opti"):
        restore(create_state(small_model(), TrainingConfig(steps=1, global_batch_size=1)), checkpoint)


def test_an_autoencoder_that_is_not_on_this_machine_is_recorded_without_digest(tmp_path, small_model, monkeypatch):
    monkeypatch.setattr("dit.autoencoder._cached", lambda id: None)
    save_file(small_model().state_dict(), tmp_path / "w.safetensors")
    recorded = import_official(tmp_path / "w.safetensors", tmp_path / "out", num_heads=4).config["autoencoder"]
    assert (recorded["id"], recorded["sha256"]) == ("stabilityai/sd-vae-ft-ema", None)
    assert (recorded["downsample"], recorded["latents_std"]) == (8, [1 / 0.18215] * 4)
    with pytest.raises(
        FileNotFoundError, match=r"no autoencoder at 'some/other' on this machine, expected a diffusers"
    ):
        import_official(tmp_path / "w.safetensors", tmp_path / "other", num_heads=4, autoencoder="some/other")
    assert not (tmp_path / "other").exists()


def test_an_autoencoder_with_other_channels_is_refused(imported, small_model):
    with pytest.raises(ValueError, match=r"has latents of 4 channels, expected 3 for this model"):
        imported(small_model(in_channels=3).state_dict())


def test_existing_files_are_never_overwritten(imported, small_model, save_model, tmp_path):
    checkpoint = imported(small_model().state_dict())
    before = {file: file.stat().st_mtime_ns for file in checkpoint.path.iterdir()}
    with pytest.raises(FileExistsError, match="exists already, expected a new path"):
        imported(small_model().state_dict())
    assert {file: file.stat().st_mtime_ns for file in checkpoint.path.iterdir()} == before
    (tmp_path / "mine.pt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_official(save_model(small_model()), tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_text() == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": True}, "qk_norm is True, .* expected False, which"),
        ({"norm": "rms"}, "norm is 'rms', .* expected 'layer', which"),
        ({"mlp": "swiglu"}, "mlp is 'swiglu', .* expected 'gelu', which"),
        ({"position": "rope"}, "position is 'rope', .* expected 'sincos', which"),
        ({"timestep_frequency_shift": 1}, "timestep_frequency_shift is 1, .* expected 0, which"),
        ({"mlp_norm_eps": 1e-5}, "mlp_norm_eps is 1e-05, .* expected 1e-06, which"),
        ({"head_width": 32, "head_depth": 1}, "head_width is 32, .* expected None, which"),
        ({"architecture": "uvit"}, "first_timestep is 0, .* expected 1, which"),
    ],
)
def test_a_model_that_an_official_file_cannot_express_is_not_exported(
    fields, message, small_model, save_model, tmp_path
):
    with pytest.raises(ValueError, match=message):
        export_official(save_model(small_model(**fields)), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ({}, {"kind": "diffusion", "prediction": "v"}, "objective.prediction is 'v', .* expected 'eps', which"),
        (
            {},
            {"kind": "diffusion", "schedule": "cosine"},
            "objective.schedule is 'cosine', .* expected 'linear', which",
        ),
        (
            {"learn_sigma": False},
            {"kind": "diffusion", "variance": "fixed_small"},
            "objective.variance is 'fixed_small', .* expected 'fixed_large', which",
        ),
        (
            {"architecture": "uvit", "first_timestep": 1},
            {"kind": "flow"},
            "objective.kind is 'flow', .* expected 'diffusion', which",
        ),
        (
            {"architecture": "uvit", "first_timestep": 1, "input_size": (4, 16)},
            published_objective(UViTConfig()),
            "width of the latents is 16, .* expected 4, which",
        ),
    ],
)
def test_what_an_import_could_not_restore_is_not_exported(model, objective, message, small_model, save_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_official(save_model(small_model(**model), objective=objective), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_objectives_equal_the_published_ones():
    assert published_objective(DiTConfig())["variance"] == "learned_range"
    assert published_objective(DiTConfig(learn_sigma=False))["variance"] == "fixed_large"
    assert published_objective(DiTConfig(), "flow") == {"kind": "flow"}
    with pytest.raises(ValueError, match="objective is 'flow' for U-ViT's official weights, expected 'diffusion'"):
        published_objective(UViTConfig(), "flow")
