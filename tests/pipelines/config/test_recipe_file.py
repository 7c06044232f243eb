"""A recipe is validated whole, before anything heavy is imported, and its error says where and what to do."""

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config.reader import RecipeError, load_recipe, resolved, validate_recipe
from raydit.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "pipelines" / "recipes" / "digits.toml"

SMALL = """\
name = "small"
output = "out"
[images]
path = "digits"
size = 32
[autoencoder.train]
steps = 40
downsample = 4
[model]
patch_size = 2
hidden_size = 32
depth = 2
num_heads = 2
[objective]
kind = "flow"
[train]
steps = 100
global_batch_size = 8
[evaluate]
sampler = "euler"
"""


@pytest.fixture
def refusal(tmp_path):
    """refusal(text, *overrides): the lines of the error that a recipe gives, its path written as RECIPE."""

    def refuse(text: str, *overrides: str) -> list[str]:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        return str(caught.value).replace(str(path), "RECIPE").splitlines()

    return refuse


@pytest.fixture
def small(tmp_path):
    """small(*overrides): the small recipe, which is valid."""

    def load(*overrides: str):
        path = tmp_path / "recipe.toml"
        path.write_text(SMALL)
        return load_recipe(path, overrides)

    return load


def edited(old: str, new: str) -> str:
    assert SMALL.count(old) == 1
    return SMALL.replace(old, new)


def test_the_shipped_recipe_loads():
    recipe = load_recipe(DIGITS)
    assert recipe.name == "digits"
    assert recipe.autoencoder.id is None and recipe.autoencoder.train is not None
    assert recipe.autoencoder.train.downsample == 4
    assert recipe.train.betas == (0.9, 0.99)
    assert recipe.objective.kind == "flow" and not recipe.objective.learn_sigma


def test_every_recipe_of_the_repository_loads():
    recipes = [*(ROOT / "pipelines" / "recipes").glob("*.toml"), *(ROOT / "tests" / "recipes").glob("*.toml")]
    assert len(recipes) >= 2
    for path in recipes:
        load_recipe(path)


@pytest.mark.parametrize("override", ["train.steps=5", "train.stesp=5", "train.steps=x"])
def test_good_and_bad_recipes_are_told_apart_without_a_heavy_import(override):
    code = f"""
import sys
from pipelines.config.reader import RecipeError, load_recipe
try:
    load_recipe({str(DIGITS)!r}, ({override!r}, "train.warmup_steps=0"))
except RecipeError:
    pass
heavy = {{"torch", "ray", "mlflow", "diffusers", "pyarrow", "sklearn", "PIL"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*none.toml, expected a TOML file.*Check the path"):
        load_recipe(tmp_path / "none.toml")


def test_a_seed_that_no_generator_takes_is_refused(refusal, small):
    (line,) = refusal(SMALL, f"seed={2**64}")
    assert line == "--set seed: found 18446744073709551616, expected a seed below 2^64. Lower seed"
    assert small(f"seed={2**64 - 1}").seed == 2**64 - 1


def test_broken_toml_is_refused_with_its_line(refusal):
    (line,) = refusal(edited('kind = "flow"', "kind = flow"))
    assert line.startswith("RECIPE: not TOML:") and "line 15" in line


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(SMALL.encode("utf-16"))
    with pytest.raises(RecipeError, match=r"recipe.toml: not TOML: .*UTF-8"):
        load_recipe(path)


def test_a_misspelt_key_is_refused_with_its_line_and_the_nearest_key(refusal):
    (line,) = refusal(edited("steps = 100", "stesp = 100"))
    assert line.startswith('RECIPE:17: train.stesp: unknown key (did you mean "train.steps"?), expected one of')


def test_a_misspelt_section_is_refused_with_its_line_and_the_nearest_section(refusal):
    (line,) = refusal(edited("[evaluate]", "[evalute]"))
    assert line.startswith('RECIPE:19: evalute: unknown key (did you mean "evaluate"?), expected one of name, output')


def test_a_misspelt_nested_section_is_refused(refusal):
    (line,) = refusal(edited("[autoencoder.train]", "[autoencoder.trian]"))
    assert line.startswith('RECIPE:6: autoencoder.trian: unknown key (did you mean "autoencoder.train"?)')


def test_a_misspelt_key_of_an_inline_table_is_refused_with_the_tables_line(refusal):
    table = 'images = {path = "digits", sise = 32}\n'
    (line,) = refusal(edited('[images]\npath = "digits"\nsize = 32\n', table))
    assert line.startswith('RECIPE:3: images.sise: unknown key (did you mean "images.size"?)')


def test_a_misspelt_override_is_refused_by_its_flag(refusal):
    (line,) = refusal(SMALL, "train.learningrate=1")
    assert line.startswith('--set train.learningrate: unknown key (did you mean "train.learning_rate"?)')


def test_an_override_of_an_unknown_section_is_refused_by_its_flag(refusal):
    (line,) = refusal(SMALL, "trian.steps=5")
    assert line.startswith('--set trian.steps: unknown key (did you mean "train"?)')


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps = 100", 'steps = "100"', "RECIPE:17: train.steps: found '100' (str), expected "),
        ("steps = 100", "steps = 1.5", "RECIPE:17: train.steps: found 1.5 (float), expected "),
        ("steps = 100", "steps = true", "RECIPE:17: train.steps: found True (bool), expected "),
        ("steps = 100", "steps = 0", "RECIPE:17: train.steps: found 0 (int), expected "),
        ('name = "small"', 'name = ""', "RECIPE:1: name: found '' (str), expected "),
        ('name = "small"', "name = 7", "RECIPE:1: name: found 7 (int), expected "),
        ("downsample = 4", "downsample = 3", "RECIPE:8: autoencoder.train.downsample: found 3 (int), expected "),
        ('path = "digits"', 'path = "digits"\nheld_out = 1.0', "RECIPE:5: images.held_out: found 1.0 (float), expect"),
        ('path = "digits"', 'path = "digits"\ncrop = "center"', "RECIPE:5: images.crop: found 'center' (str), expect"),
        ("steps = 100", "steps = 100\nbetas = [0.9, 1.5]", "RECIPE:18: train.betas: found 1.5 (float), expected "),
        ("steps = 40", "steps = 40\nbetas = [0.9, 1.5]", "RECIPE:8: autoencoder.train.betas: found 1.5 (float), exp"),
        ("steps = 100", "steps = 100\nbetas = [0.9]", "RECIPE:18: train.betas: "),
        ("steps = 100", "steps = 100\nlearning_rate = 0.0", "RECIPE:18: train.learning_rate: found 0.0 (float), exp"),
        ("steps = 100", "steps = 100\nlearning_rate = nan", "RECIPE:18: train.learning_rate: "),
        ("steps = 100", "steps = 100\nlearning_rate = inf", "RECIPE:18: train.learning_rate: found inf, expected "),
        ("steps = 100", "steps = 100\nlearning_rate = 1e999", "RECIPE:18: train.learning_rate: found inf, expected "),
        ("[evaluate]", "[evaluate]\ncfg_scale = 1" + "0" * 400, "RECIPE:20: evaluate.cfg_scale: found inf, expected "),
        ("[evaluate]", "[evaluate]\ncfg_interval = [nan, 1]", "RECIPE:20: evaluate.cfg_interval: found nan, expected "),
        (
            "[evaluate]",
            "[evaluate]\ncfg_scale = 2.0\ncfg_interval = [0.8, 0.2]",
            "RECIPE:21: evaluate.cfg_interval: found [0.8, 0.2], expected [low, high]",
        ),
        ("steps = 100", "steps = 2020-01-01", "RECIPE:17: train.steps: "),
        (
            "[evaluate]",
            '[evaluate]\ndtype = "float16"',
            "RECIPE:20: evaluate.dtype: found 'float16' (str), expected ",
        ),
        ("[train]\nsteps = 100", "[tracking]\nuri = 5\n[train]", "RECIPE:17: tracking.uri: found 5 (int), expected "),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_what_was_found_and_what_was_expected(refusal, old, new, expected):
    (line,) = refusal(edited(old, new))
    assert line.startswith(expected)
    assert len(line) > len(expected)


def test_a_wrong_override_is_refused_by_its_flag(refusal):
    (line,) = refusal(SMALL, "train.steps=many")
    assert line.startswith("--set train.steps: found 'many' (str), expected ")


def test_an_integer_is_accepted_for_a_float(small):
    assert small("train.learning_rate=1").train.learning_rate == 1.0


def test_missing_keys_and_sections_are_refused(refusal):
    (line,) = refusal(edited('name = "small"\n', ""))
    assert line == "RECIPE: name: missing, expected a value. Set name, which has no default"
    lines = refusal('name = "x"\n')
    assert [line.split(": ")[1] for line in lines] == ["output", "images", "autoencoder", "model"]


def test_a_missing_key_of_a_section_names_the_sections_line(refusal):
    (line,) = refusal(edited('path = "digits"\n', ""))
    assert line == "RECIPE:3: images.path: missing, expected a value. Set images.path, which has no default"


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("[autoencoder.train]", '[autoencoder]\nid = "x"\n[autoencoder.train]', ":6: autoencoder", "both id and"),
        ("[autoencoder.train]\nsteps = 40\ndownsample = 4", "[autoencoder]", ":6: autoencoder", "neither id nor"),
        ('kind = "flow"', 'kind = "flow"\nschedule = "cosine"', ":16: objective.schedule", "Remove schedule"),
        ('kind = "flow"', 'kind = "flow"\nweighting = "min_snr"', ":16: objective.weighting", "Remove weighting"),
        ('kind = "flow"', 'kind = "diffusion"\nmin_snr_gamma = 5.0', ":16: objective.min_snr_g", "alone reads it"),
        ('kind = "flow"', 'kind = "diffusion"\ntime = "uniform"', ":16: objective.time", "Remove time"),
        ("[model]", '[model]\nname = "DiT-S/2"', ":10: model.name", "found 'DiT-S/2' together with patch_size"),
        ("hidden_size = 32\n", "", ":9: model", "no name and no hidden_size"),
        ("hidden_size = 32", "hidden_size = 33", ":11: model.hidden_size", "multiple of num_heads"),
        ('sampler = "euler"', 'sampler = "ddim"', ":20: evaluate.sampler", "expected one of euler, heun"),
        ('sampler = "euler"', 'sampler = "eular"', ":20: evaluate.sampler", "found 'eular', expected one of"),
        ("num_heads = 2", "num_heads = 2\nclass_dropout_prob = 0", ":22: evaluate.cfg_scale", "null class"),
        ("global_batch_size = 8", "global_batch_size = 8\nnum_workers = 3", ":18: train.global_batch", "found 8"),
        ("steps = 40", "steps = 40\nglobal_batch_size = 5\nnum_workers = 2", ":8: autoencoder.train.g", "found 5"),
        ("steps = 40", "steps = 40\nwidth = 12", ":8: autoencoder.train.width", "multiple of 8"),
        ('sampler = "euler"', 'weights = "ema_0.2"\nsampler = "euler"', ":20: evaluate.weights", "one of ema, raw. "),
        (
            "global_batch_size = 8",
            "ema_sigma_rels = [0.1, 0.1]",
            ":18: train.ema_sigma_rels",
            "twice, expected diff",
        ),
        ("global_batch_size = 8", "warmup_steps = 101", ":18: train.warmup_steps", "longer than the training"),
        ("size = 32\n[auto", "size = 30\n[auto", ":5: images.size", "multiple of autoencoder.train.downsample = 4"),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_their_place(refusal, old, new, place, words):
    text = edited(old, new)
    if "class_dropout_prob" in new:
        text += "cfg_scale = 1.5\n"
    (line,) = refusal(text)
    assert line.startswith(f"RECIPE{place}")
    assert words in line


def test_the_dropout_probability_has_two_names_and_is_recorded_under_the_older_one(tmp_path):
    sizes = "num_heads = 2\n"
    for name, text in {
        "new": f"{sizes}condition_dropout_prob = 0.3\n",
        "old": f"{sizes}class_dropout_prob = 0.3\n",
        "both": f"{sizes}condition_dropout_prob = 0.3\nclass_dropout_prob = 0.3\n",
    }.items():
        (tmp_path / f"{name}.toml").write_text(edited(sizes, text))
    new, old, both = (load_recipe(tmp_path / f"{name}.toml") for name in ("new", "old", "both"))
    assert new == old == both and new.model.condition_dropout_prob == 0.3
    recorded = resolved(new)["model"]
    assert recorded["class_dropout_prob"] == 0.3 and "condition_dropout_prob" not in recorded
    for name, override in itertools.product(("new", "old", "both"), ("condition", "class")):
        recipe = load_recipe(tmp_path / f"{name}.toml", (f"model.{override}_dropout_prob=0.2",))
        assert recipe.model.class_dropout_prob == 0.2, "an override replaces the value under either name"


@pytest.mark.parametrize(
    ("added", "line", "words"),
    [
        (
            "condition_dropout_prob = 0.3\nclass_dropout_prob = 0.1",
            "RECIPE:14: model.condition_dropout_prob",
            "is 0.3 and class_dropout_prob, its older name, is 0.1, expected one value. Remove class_dropout_prob",
        ),
        ("condition_dropout_prob = 1.5", "RECIPE:14: model.condition_dropout_prob", "found 1.5 (float), expected a n"),
        ("class_dropout_prob = 1.5", "RECIPE:14: model.class_dropout_prob", "found 1.5 (float), expected a number"),
    ],
)
def test_mistakes_in_the_dropout_probability_bear_the_name_that_was_written(refusal, added, line, words):
    (mistake,) = refusal(edited("num_heads = 2", f"num_heads = 2\n{added}"))
    assert mistake.startswith(line) and words in mistake


def test_an_average_that_training_keeps_can_be_evaluated(small):
    recipe = small("train.ema_sigma_rels=[0.05, 0.10]", "evaluate.weights=ema_0.1")
    assert recipe.train.ema_sigma_rels == (0.05, 0.1) and recipe.evaluate.weights == "ema_0.1"


def test_overrides_that_contradict_the_recipe_are_refused_by_their_flag(refusal):
    (line,) = refusal(SMALL, "evaluate.sampler=ddpm")
    assert line.startswith("--set evaluate.sampler: found 'ddpm', a sampler for diffusion")


def test_an_unknown_model_name_is_refused_with_the_nearest(refusal):
    sizes = "patch_size = 2\nhidden_size = 32\ndepth = 2\nnum_heads = 2"
    (line,) = refusal(edited(sizes, 'name = "DiT-S2"'))
    assert line.startswith("RECIPE:10: model.name: ")
    assert "'DiT-S2'" in line and "did you mean 'DiT-S/2'?" in line


def test_all_mistakes_are_reported_together(refusal):
    text = edited("steps = 100", "stesp = 100\nlearning_rate = -1.0").replace("size = 32", 'size = "32"', 1)
    text = text.replace("hidden_size", "hiden_size")
    lines = refusal(text)
    assert [line.split(": ")[0] + ": " + line.split(": ")[1] for line in lines] == [
        "RECIPE:11: model.hiden_size",
        "RECIPE:17: train.stesp",
        "RECIPE:5: images.size",
        "RECIPE:18: train.learning_rate",
    ]


@pytest.mark.parametrize("override", ["train.steps", "=5", " =5"])
def test_an_override_without_key_and_value_is_refused(refusal, override):
    (line,) = refusal(SMALL, override)
    expected = "found no key and value, expected KEY=VALUE. Write it such as --set train.learning_rate=2e-4"
    assert line == f"--set {override}: {expected}"


def test_an_override_below_a_value_is_refused(refusal):
    (line,) = refusal(SMALL, "name.first=x")
    assert line == "--set name.first=x: name is a value, expected a section. Set name itself, or correct the key"


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(small):
    recipe = small("train.steps=7", "train.steps=9", "name=other", "tracking.uri=sqlite:///a=b.db")
    assert recipe.train.steps == 9
    assert recipe.name == "other"
    assert recipe.tracking.uri == "sqlite:///a=b.db"


def test_an_override_repairs_what_the_file_has_wrong(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(edited("steps = 100", 'steps = "x"'))
    assert load_recipe(path, ("train.steps=5",)).train.steps == 5


def test_lists_become_tuples(small):
    recipe = small("train.betas=[0.8, 0.95]", "evaluate.cfg_interval=[0, 0.5]")
    assert recipe.train.betas == (0.8, 0.95)
    assert recipe.evaluate.cfg_interval == (0.0, 0.5)


@pytest.mark.parametrize("path", [DIGITS, None])
def test_a_resolved_recipe_is_json_and_validates_to_an_equal_one(small, path):
    recipe = load_recipe(path) if path else small("evaluate.cfg_interval=[0.1, 0.5]")
    again = validate_recipe(json.loads(json.dumps(resolved(recipe), allow_nan=False)))
    assert again == recipe


def test_defaults_are_those_of_the_paper(tmp_path):
    path = tmp_path / "recipe.toml"
    lines = ['name = "x"', 'output = "o"', "[images]", 'path = "p"', "[autoencoder]", 'id = "a"', "[model]"]
    path.write_text("\n".join([*lines, 'name = "DiT-XL/2"']))
    recipe = load_recipe(path)
    train = recipe.train
    assert (train.global_batch_size, train.learning_rate, train.ema_decay) == (256, 1e-4, 0.9999)
    assert (train.weight_decay, train.warmup_steps, train.lr_schedule) == (0.0, 0, "constant")
    assert recipe.objective.kind == "diffusion" and recipe.objective.learn_sigma
    assert (recipe.evaluate.num_samples, recipe.evaluate.sampling_steps) == (50_000, 250)


def test_an_error_of_a_recipe_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(RecipeError("train.steps: found 0", "name: missing")))
    assert isinstance(error, InvalidInput) and error.mistakes == ("train.steps: found 0", "name: missing")
    assert str(error) == "train.steps: found 0\nname: missing"


def test_a_value_that_fits_no_member_of_a_union_is_one_mistake(refusal):
    (line,) = refusal(SMALL, "train.num_workers=many")
    assert line.startswith("--set train.num_workers: found 'many' (str), expected an integer, or a list")


def test_a_recipe_cannot_be_changed(small):
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().name = "other"


def test_a_stage_asks_only_for_the_sections_that_it_needs(tmp_path):
    """Without a word about the others in what it records, which a later stage reads again."""
    path = tmp_path / "recipe.toml"
    head, images, autoencoder = 'name = "x"\noutput = "x"\n', '[images]\npath = "x"\n', '[autoencoder]\nid = "x"\n'
    path.write_text(head + images + autoencoder)
    for stage in ("encode", "autoencoder"):
        config = load_recipe(path, stage=stage)
        assert "model" not in resolved(config) and resolved(config)["autoencoder"]["id"] == "x"
        assert validate_recipe(resolved(config), stage=stage) == config
        assert dataclasses.replace(config, seed=1).seed == 1
    for stage in ("train", "run", "plan", ""):
        with pytest.raises(ValueError, match="recipe.toml: model: missing, expected a value. Set model") as error:
            load_recipe(path, stage=stage)
        assert "autoencoder" not in str(error.value)
    with pytest.raises(ValueError, match=r"model: missing.*Add \[model\]"):
        config.model.resolve(input_size=8, in_channels=4, num_classes=1, learn_sigma=False)
    path.write_text(head + images)
    with pytest.raises(ValueError, match="recipe.toml: autoencoder: missing"):
        load_recipe(path, stage="encode")
    path.write_text(head + autoencoder)
    with pytest.raises(ValueError, match="recipe.toml: images: missing"):
        load_recipe(path, stage="encode")


@pytest.mark.parametrize(("kind", "sampler"), [("flow", "euler"), ("diffusion", "ddpm")])
def test_a_recipe_without_a_sampler_has_one_that_fits_its_objective(tmp_path, kind, sampler):
    """So that training needs no [evaluate]: the checkpoint's recipe can be evaluated by."""
    path = tmp_path / "recipe.toml"
    sections = '[images]\npath = "x"\n[autoencoder]\nid = "x"\n[model]\nname = "DiT-S/2"\n[objective]\n'
    for evaluate in ("", "[evaluate]\nnum_samples = 20\n"):
        path.write_text(f'name = "x"\noutput = "x"\n{sections}kind = "{kind}"\n{evaluate}')
        assert load_recipe(path, stage="train").evaluate.sampler == sampler


def test_an_interval_that_nothing_reads_may_have_its_ends_swapped(small):
    """Checkpoints that were trained by such a recipe are evaluated by it as ever."""
    assert small("evaluate.cfg_interval=[0.8, 0.2]").evaluate.cfg_interval == (0.8, 0.2)
