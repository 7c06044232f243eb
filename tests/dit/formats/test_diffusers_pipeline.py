"""diffusers pipelines: export and import give equal outputs with diffusers' classes, or are refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dit.autoencoder import Autoencoder, LatentScale, save_autoencoder
from dit.checkpoint import export_diffusers, import_diffusers
from dit.config import DiTConfig, UViTConfig
from dit.diffusion import GaussianDiffusion
from dit.formats.diffusers_pipeline import SCHEDULES, check_expressible, write_autoencoder
from dit.formats.diffusers_weights import to_diffusers
from dit.objective import create_process
from dit.samplers import guided, sample_ddim

T, Y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10])


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path, monkeypatch):
    """Give each test its own cache, into which diffusers copies a folder's class before importing it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def export(save_model, tiny_autoencoder, tmp_path):
    """export(model): the pipeline folder of its averaged weights."""

    def make(model, name="pipeline", **config):
        return export_diffusers(
            save_model(model, f"{name} step", **config), tmp_path / name, autoencoder=tiny_autoencoder
        )

    return make


@pytest.fixture
def stock(tmp_path, tiny_autoencoder):
    """stock(): a pipeline of an untrained diffusers model, saved by diffusers; its folder and the model."""

    def make(**fields):
        shape = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
        model = DiTTransformer2DModel(**shape, out_channels=8, num_embeds_ada_norm=10, **fields).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        embedder = model.transformer_blocks[0].norm1.emb.state_dict()
        model.transformer_blocks[1].norm1.emb.load_state_dict(embedder)
        autoencoder = AutoencoderKL.from_pretrained(tiny_autoencoder, low_cpu_mem_usage=False)
        folder = tmp_path / "stock"
        DiTPipeline(model, autoencoder, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
        return folder, model

    return make


def load(folder, **options):
    pipeline = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(one, other):
    return torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eps", [{}, {"norm_eps": 1e-6}, {"norm_eps": 1e-2}])
def test_an_imported_pipeline_computes_the_same_as_diffusers(stock, rebuilt, tmp_path, eps):
    folder, model = stock(**eps)
    checkpoint = import_diffusers(folder, tmp_path / "ours")
    x = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        close(rebuilt(checkpoint)(x, T, Y), model(x, T, Y).sample)
    assert checkpoint.config["source"] == {"format": "diffusers", "name": "stock", "numerics": "diffusers"}
    assert checkpoint.config["model"]["mlp_norm_eps"] == (eps or {"norm_eps": 1e-5})["norm_eps"]
    # The pipeline divides latents by the scaling factor, 1 here, and reads no other scale.
    recorded = checkpoint.config["autoencoder"]
    assert (recorded["latents_mean"], recorded["latents_std"]) == ([0.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"learn_sigma": False, "patch_size": 4},
        {"num_classes": 0},
        {"class_dropout_prob": 0.0},
        {"num_classes": 1000},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_export_to_diffusers_and_import_change_nothing(
    fields, shift, small_model, save_model, export, tmp_path, rebuilt
):
    model = small_model(timestep_frequency_shift=shift, **fields)
    folder = export(model)
    ours = save_model(model)
    back = import_diffusers(folder, tmp_path / "back")
    assert back.config["model"] == ours.config["model"]
    assert back.config["class_names"] == ours.config["class_names"]
    assert back.config["objective"] == {"schedule": "linear", "prediction": "eps", **ours.config["objective"]}
    assert all(torch.equal(value, ours.weights()[name]) for name, value in back.weights().items())
    x, y = torch.randn(4, 4, 8, 8), Y.clamp(max=model.config.num_labels - 1) if model.config.num_classes else Y * 0
    theirs = load(folder, trust_remote_code=True).transformer
    with torch.no_grad():
        assert torch.equal(rebuilt(back)(x, T, y), rebuilt(ours)(x, T, y))
        close(theirs(x, T, y).sample, rebuilt(ours)(x, T, y))
        if model.config.null_class is not None:  # diffusers' pipeline takes class 1000 for it
            last = torch.full_like(y, model.config.null_class)
            close(theirs(x, T, torch.full_like(y, 1000)).sample, rebuilt(ours)(x, T, last))


def test_diffusers_refuses_official_frequencies_without_trust_remote_code(small_model, export):
    folder = export(small_model())
    with pytest.raises(ValueError, match="custom code in official_dit.py"):
        load(folder)
    with pytest.raises(NotImplementedError, match="ada_norm_zero_official"):
        DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    assert type(load(folder, trust_remote_code=True).transformer).__name__ == "OfficialDiT"


def test_a_model_with_diffusers_frequencies_is_exported_without_code(small_model, export):
    folder = export(small_model(timestep_frequency_shift=1))
    assert not [file for file in folder.rglob("*") if file.suffix == ".py"]
    assert type(load(folder).transformer) is DiTTransformer2DModel


def test_weights_converted_from_official_ones_can_be_imported_with_either_numerics(
    small_model, stock, rebuilt, tmp_path
):
    """Official weights are loaded into diffusers' class, as in the published conversion of DiT-XL/2."""
    folder, theirs = stock()
    model = small_model()
    _, state = to_diffusers(DiTConfig(**{**vars(model.config), "num_classes": 10}), model.state_dict())
    table = "norm1.emb.class_embedder.embedding_table.weight"
    theirs.load_state_dict({name: value[:11] if name.endswith(table) else value for name, value in state.items()})
    theirs.save_pretrained(folder / "transformer")
    x = torch.randn(4, 4, 8, 8)
    official = rebuilt(import_diffusers(folder, tmp_path / "official", numerics="official"))
    diffusers = rebuilt(import_diffusers(folder, tmp_path / "diffusers", numerics="diffusers"))
    with torch.no_grad():
        assert torch.equal(official(x, T, Y), model(x, T, Y))
        close(diffusers(x, T, Y), theirs(x, T, Y).sample)
        assert (official(x, T, Y) - diffusers(x, T, Y)).abs().max() > 0.1  # the trap


@pytest.mark.parametrize(
    ("cfg_scale", "objective", "fields"),
    [
        (1.0, {"variance": "learned_range"}, {}),
        (4.0, {"variance": "learned_range"}, {"timestep_frequency_shift": 1}),
        (4.0, {"variance": "fixed_small", "schedule": "cosine", "prediction": "v"}, {"learn_sigma": False}),
        (1.0, {"variance": "learned_range", "schedule": "scaled_linear", "prediction": "x0"}, {"num_classes": 0}),
    ],
)
def test_a_pipeline_samples_the_same_images(
    cfg_scale, objective, fields, small_model, save_model, export, rebuilt, tiny_autoencoder
):
    """Both sample 5 DDIM steps from the same noise, and decode with an autoencoder that has a scale per channel."""
    model = small_model(**fields)
    objective = {"kind": "diffusion", **objective}
    network = rebuilt(save_model(model, objective=objective))
    labels = [1, 5, 7] if model.config.num_classes else [0, 0, 0]
    images = load(export(model, objective=objective), trust_remote_code=True)(
        labels,
        guidance_scale=cfg_scale,
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
        output_type="np",
    ).images
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    process = create_process(**objective).spaced(5, constant_stride=True)
    latents = sample_ddim(guided(network, cfg_scale), noise, torch.tensor(labels), process=process, steps=5)
    autoencoder = Autoencoder.load(tiny_autoencoder)
    with torch.no_grad():
        expected = autoencoder.module.decode(autoencoder.scale.unscale(latents)).sample
    expected = (expected / 2 + 0.5).permute(0, 2, 3, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.5 and expected.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(images), expected.clamp(0, 1), atol=2e-5, rtol=0)


def test_guiding_a_pipeline_without_null_class_fails(small_model, export):
    pipeline = load(export(small_model(class_dropout_prob=0.0)), trust_remote_code=True)
    with pytest.raises(IndexError):
        pipeline([1], guidance_scale=4.0, num_inference_steps=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_schedules_are_the_same(schedule):
    theirs = DDIMScheduler(**SCHEDULES[schedule]).alphas_cumprod.double()
    torch.testing.assert_close(theirs, GaussianDiffusion(schedule=schedule).alphas_cumprod, rtol=1e-4, atol=0)


def test_labels_are_found_by_their_names(small_model, export):
    pipeline = load(export(small_model()), trust_remote_code=True)
    assert pipeline.get_label_ids(["class 3", "class 9"]) == [3, 9]


def test_the_scale_is_absorbed_by_the_autoencoder(tiny_autoencoder, tmp_path):
    ours = Autoencoder.load(tiny_autoencoder)
    write_autoencoder(tiny_autoencoder, tmp_path / "vae", ours.scale)
    theirs = Autoencoder.load(tmp_path / "vae")
    assert theirs.scale == LatentScale((0.0,) * 4, (1.0,) * 4) and theirs.module.config.scaling_factor == 1.0
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    mean, log_variance = ours.encode(images).chunk(2, dim=1)
    their_mean, their_log_variance = theirs.encode(images).chunk(2, dim=1)
    close(their_mean, ours.scale.scale(mean))
    std = torch.tensor(ours.scale.std).view(1, -1, 1, 1)
    close(their_log_variance.exp(), log_variance.exp() / std**2)
    assert (theirs.decode(latents).int() - ours.decode(latents).int()).abs().max() <= 1


def test_an_autoencoder_with_a_plain_scaling_factor_is_copied_unchanged(tiny_autoencoder, tmp_path):
    module = AutoencoderKL.from_pretrained(tiny_autoencoder, low_cpu_mem_usage=False)
    module.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.18215)
    module.save_pretrained(tmp_path / "plain")
    write_autoencoder(tmp_path / "plain", tmp_path / "vae", Autoencoder.load(tmp_path / "plain").scale)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "vae" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_an_autoencoder_that_cannot_absorb_its_scale_is_refused(tmp_path):
    module = AutoencoderKL(latent_channels=4, norm_num_groups=8, block_out_channels=(8,), use_post_quant_conv=False)
    scale = LatentScale((1.0,) * 4, (2.0,) * 4)
    save_autoencoder(module, tmp_path / "vae", scale)
    with pytest.raises(
        ValueError, match="the latents have a scale per channel, .* found use_quant_conv or use_post_quant_conv off"
    ):
        write_autoencoder(tmp_path / "vae", tmp_path / "out", scale)


@pytest.mark.parametrize(
    ("config", "objective", "message"),
    [
        (DiTConfig(), {"kind": "flow"}, "objective kind = 'flow', expected 'diffusion'"),
        (DiTConfig(), {"num_timesteps": 100}, "num_timesteps = 100, expected 1000"),
        (DiTConfig(conditioning="adaln"), {}, "conditioning = 'adaln', expected 'adaln_zero'"),
        (DiTConfig(qk_norm=True), {}, "qk_norm = True, expected False"),
        (DiTConfig(norm="rms"), {}, "norm = 'rms', expected 'layer'"),
        (DiTConfig(mlp="swiglu"), {}, "mlp = 'swiglu', expected 'gelu'"),
        (DiTConfig(position="rope", hidden_size=1024), {}, "position = 'rope', expected 'sincos'"),
        (DiTConfig(head_width=2048, head_depth=2), {}, "head_width = 2048, expected None"),
        (DiTConfig(mlp_ratio=2.0), {}, "MLP width = 2304, expected 4608"),
        (DiTConfig(input_size=(16, 32)), {}, "width of the latents = 32, expected 16"),
        (DiTConfig(num_classes=1001), {}, "found 1001 classes, expected at most 1000"),
        (UViTConfig(), {}, "DiTPipeline cannot run"),
    ],
)
def test_what_a_pipeline_cannot_express_is_refused(config, objective, message):
    with pytest.raises(ValueError, match=message):
        check_expressible(config, {"kind": "diffusion", **objective})


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "not a DiT pipeline: found StableDiffusion",
        ),
        ("model_index.json", {"transformer": ["my_code", "MyDiT"]}, "with transformer my_code.MyDiT, expected DiTPip"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "found activation_fn = 'geglu', expected 'gelu-app"),
        ("transformer/config.json", {"num_layers": 3}, "of another model; 19 entries differ"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.03}, "schedule is not supported: found .*0.03"),
        (
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1]},
            "schedule is not supported: found .*trained_betas",
        ),
        ("model_index.json", {"id2label": {"0": "cat"}}, "with different rows after theirs, expected one for the null"),
        (
            "model_index.json",
            {"id2label": {str(label): f"class {label}" for label in range(1000)}},
            "found 1,000 classes under id2label in model_index.json, and 11 rows of labels, expected a row for each",
        ),
        ("model_index.json", {"id2label": ["cat"]}, "found id2label .*cat.*, expected names by their labels"),
        ("model_index.json", {"id2label": {"0": None}}, "found id2label"),
        ("model_index.json", {"transformer": [None, None]}, "with transformer None.None, expected DiTPipeline"),
        ("model_index.json", {"transformer": 5}, "with transformer None, expected DiTPipeline"),
        ("transformer/config.json", {"num_embeds_ada_norm": None}, "found num_embeds_ada_norm = None, expected an int"),
        (
            "transformer/config.json",
            {"num_layers": -1},
            "found num_layers = -1, expected an integer from 0 to 10,000,000",
        ),
        ("transformer/config.json", {"attention_head_dim": "8"}, "found attention_head_dim = 8, expected an integer"),
    ],
)
def test_an_unsupported_pipeline_is_refused(stock, tmp_path, file, changes, message):
    folder, _ = stock()
    change(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        import_diffusers(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_pipeline_with_different_embedders_per_block_is_refused(stock, tmp_path):
    folder, model = stock()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1e-3)
    model.save_pretrained(folder / "transformer")
    with pytest.raises(
        ValueError, match=r"blocks.1.*linear_1.bias differs from .*blocks.0.*, expected equal embedders"
    ):
        import_diffusers(folder, tmp_path / "ours")


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "50KB"}])
def test_a_pipeline_of_a_variant_or_in_shards_is_imported_as_the_same(stock, tmp_path, options):
    folder, model = stock()
    expected = import_diffusers(folder, tmp_path / "expected")
    for name in ("transformer", "vae"):
        module = type(model) if name == "transformer" else AutoencoderKL
        loaded = module.from_pretrained(folder / name, low_cpu_mem_usage=False)
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
        loaded.save_pretrained(folder / name, **options)
    found = import_diffusers(folder, tmp_path / "found")
    assert not (folder / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    for key, value in expected.weights("ema").items():
        assert torch.equal(found.weights("ema")[key], value)


def test_variants_and_shards_of_an_autoencoder_are_copied_so_that_diffusers_loads_them(tiny_autoencoder, tmp_path):
    module = AutoencoderKL.from_pretrained(tiny_autoencoder, low_cpu_mem_usage=False)
    module.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.18215)
    for name, options in {
        "variant": {"variant": "fp16"},
        "shards": {"max_shard_size": "50KB", "variant": "bf16"},
    }.items():
        module.save_pretrained(tmp_path / name, **options)
        write_autoencoder(tmp_path / name, tmp_path / f"{name} vae", Autoencoder.load(tmp_path / name).scale)
        copied = AutoencoderKL.from_pretrained(tmp_path / f"{name} vae", low_cpu_mem_usage=False)
        assert all(torch.equal(copied.state_dict()[key], value) for key, value in module.state_dict().items())


def test_an_incomplete_folder_is_refused(stock, tmp_path):
    folder, _ = stock()
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"found no scheduler/scheduler_config.json, expected a folder with"):
        import_diffusers(folder, tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match=r"found no model_index.json"):
        import_diffusers(tmp_path, tmp_path / "ours")


def test_a_folder_in_use_is_not_written_to(small_model, export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export(small_model(), "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
