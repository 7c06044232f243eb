"""Cropping against closed forms of its steps (Dhariwal & Nichol 2021)."""

import os

import numpy as np
import pytest
from PIL import Image

from pipelines.config.recipe import ImagesConfig
from pipelines.images.preprocess import crop_image, read_cropped


def grey(array) -> Image.Image:
    return Image.fromarray(np.repeat(np.asarray(array, np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("crop", ["adm", "resize"])
@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (17, 33), (5, 3), (64, 9), (7, 100)])
def test_an_image_of_one_colour_keeps_its_colour(crop, shape):
    image = crop_image(Image.new("RGB", shape[::-1], (10, 200, 77)), 8, crop)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert (image == (10, 200, 77)).all()


@pytest.mark.parametrize("crop", ["adm", "resize"])
def test_an_image_of_the_exact_size_is_unchanged(crop):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_image(Image.fromarray(pixels), 8, crop), pixels)


@pytest.mark.parametrize("crop", ["adm", "resize"])
@pytest.mark.parametrize("size", [32, 256, 1024])
def test_images_of_any_size_become_squares_of_the_recipes_size(size, crop):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(300, axis=0))
    for sides in ((256, 300), (40, 700), (2000, 31)):
        image = crop_image(ramp.resize(sides), size, crop)
        assert image.shape == (size, size, 3) and image[0, 0, 0] <= image[0, -1, 0]


def test_an_extremely_long_image_is_refused_before_it_fills_the_memory():
    """A line of 65,535 pixels would become 256 x 16,776,960, which are 13 GB."""
    line = Image.new("RGB", (1, 65_535))
    with pytest.raises(ValueError, match="found 1 x 65,535 pixels, which become 256 x 16,776,960 before the crop;"):
        crop_image(line, 256, "adm")
    assert crop_image(line, 256, "resize").shape == (256, 256, 3)


def test_an_image_of_twice_the_size_is_halved_by_averaging_four_pixels():
    checkerboard = np.indices((16, 16)).sum(0) % 2 * 200
    assert (crop_image(grey(checkerboard), 8, "adm") == 100).all()
    pixels = np.random.default_rng(0).integers(0, 64, (16, 16)) * 4
    halved = crop_image(grey(pixels), 8, "adm")[..., 0]
    means = pixels.reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(halved - means).max() <= 0.5


def test_an_image_of_four_times_the_size_is_halved_twice():
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8))
    np.testing.assert_array_equal(crop_image(grey(np.kron(blocks, np.ones((4, 4)))), 8, "adm")[..., 0], blocks)


@pytest.mark.parametrize(("length", "first"), [(8, 0), (9, 0), (10, 1), (11, 1), (15, 3)])
def test_the_crop_is_central_and_rounds_down(length, first):
    ramp = np.tile(np.arange(length) * 10, (8, 1))
    np.testing.assert_array_equal(crop_image(grey(ramp), 8, "adm")[..., 0], ramp[:, first : first + 8])
    np.testing.assert_array_equal(crop_image(grey(ramp.T), 8, "adm")[..., 0], ramp.T[first : first + 8])


def test_halving_rounds_odd_sides_down():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 19, 3), dtype=np.uint8))
    half = np.asarray(image.resize((9, 8), Image.Resampling.BOX))
    np.testing.assert_array_equal(crop_image(image, 8, "adm"), half[:, :8])


def test_images_of_less_than_twice_the_size_are_resized_bicubically():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((10, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_image(image, 8, "adm"), resized[:, 1:9])


def test_resizing_keeps_the_entire_image():
    halves = np.repeat([[0, 240]], 16, axis=1).repeat(4, axis=0)
    resized = crop_image(grey(halves), 8, "resize")[..., 0]
    assert (resized[:, 0] == 0).all() and (resized[:, -1] == 240).all()
    np.testing.assert_array_equal(resized, resized[:1].repeat(8, axis=0))


def test_errors_name_bad_images_and_good_ones_stay_in_order(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    Image.new("L", (20, 30), 7).save(tmp_path / "c.png")
    config = ImagesConfig(path=str(tmp_path), size=4)
    images, good, errors = read_cropped(config, ["a.png", "b.png", "c.png", "gone.png"])
    assert images.shape == (2, 4, 4, 3) and good == [0, 2]
    assert images[0, 0, 0].tolist() == [255, 0, 0] and images[1, 0, 0].tolist() == [7, 7, 7]
    assert errors.keys() == {"b.png", "gone.png"}
    # The quarantine must be equal byte for byte in every run.
    assert errors["b.png"] == "UnidentifiedImageError: no image format known here: 4 bytes from b'text'"
    images, good, errors = read_cropped(config, ["b.png"])
    assert images.shape == (0, 4, 4, 3) and good == [] and len(errors) == 1


def test_a_crop_keeps_no_more_pixels_in_memory_than_its_own():
    crop = crop_image(Image.new("RGB", (1, 200)), 16, "adm")
    owner = crop
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    held = owner.nbytes if owner.base is None else len(owner.base)
    assert held == crop.nbytes == 16 * 16 * 3


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_replaced_npz_file_is_read_anew_in_the_same_process(tmp_path, write):
    config = ImagesConfig(path=str(tmp_path / "images.npz"), size=8)
    for number, shape in enumerate([(2, 8, 8, 3), (2, 8, 8, 3), (3, 16, 16, 3)]):
        values = [50 * number + position for position in range(shape[0])]
        write(tmp_path / "images.npz", np.zeros(shape, np.uint8) + np.array(values, np.uint8)[:, None, None, None])
        os.utime(tmp_path / "images.npz", (number, number))
        keys = [f"{index:07d}" for index in range(shape[0])]
        assert read_cropped(config, keys).images.mean(axis=(1, 2, 3)).tolist() == values
