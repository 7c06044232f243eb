"""Batches are a function of (seed, batch number, position), whatever the number of workers and the first batch."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from operator import attrgetter

import numpy as np
import pytest
import torch
from tiny_images import image_rows

from dit.autoencoder import LatentScale
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.random import Stream, normal, uniform
from pipelines.latents.dataset import LatentArrays
from pipelines.training.data.batches import image_batches, latent_batches, prefetch
from pipelines.training.data.loading import ArrayLatents
from pipelines.training.data.order import EpochOrder, WorkerShare, batch_rows

ROWS, BATCH = 22, 8
SCALE = LatentScale((0.5, -1.0), (2.0, 0.25))
FIELDS = ("latents", "conditions.labels", "t", "noise", "rows")


DRAWS = {"random": None}


@pytest.fixture(autouse=True, params=[None, "counter"], ids=["generators", "counter"])
def draws(request):
    """Every property holds for both ways of drawing random numbers."""
    DRAWS["random"] = request.param
    return request.param


def make_arrays(rows=ROWS, flip=True, log_variance=-1.0):
    """Return latents whose first pixel is their row number, negative for the flipped image."""
    moments = np.zeros((rows, 4, 2, 3), np.float16)
    moments[:, :2] = np.arange(rows)[:, None, None, None]
    moments[:, 2:] = log_variance
    flipped = moments.copy()
    flipped[:, :2] *= -1
    return LatentArrays(np.arange(rows) % 10, moments, flipped if flip else None)


def batches(arrays, count, *, process=None, rank=0, num_workers=1, first_batch=0, size=BATCH, **changes):
    settings = {"scale": SCALE, "null_class": 10, "dropout": 0.3, "seed": 5, **DRAWS, **changes}
    share = WorkerShare(rank, num_workers, size)
    latents = ArrayLatents(arrays, EpochOrder(len(arrays.labels), settings["seed"]))
    stream = latent_batches(latents, process or FlowMatching(), share=share, first_batch=first_batch, **settings)
    return list(islice(stream, count))


def field(batch, name):
    return attrgetter(name)(batch)


def assert_equal(first, second):
    for name in FIELDS:
        assert torch.equal(field(first, name), field(second, name)), name


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("process", [FlowMatching("logit_normal"), GaussianDiffusion()])
def test_a_batch_does_not_depend_on_the_number_of_workers(num_workers, process):
    arrays = make_arrays()
    full = batches(arrays, 4, process=process)
    parts = [batches(arrays, 4, process=process, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    for step, batch in enumerate(full):
        for name in FIELDS:
            assert torch.equal(field(batch, name), torch.cat([field(part[step], name) for part in parts])), name


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_rows_of_a_batch_do_not_depend_on_the_number_of_workers(num_workers):
    for step in range(6):
        shares = [WorkerShare(rank, num_workers, BATCH) for rank in range(num_workers)]
        rows = np.concatenate([batch_rows(EpochOrder(ROWS, 3), share, step) for share in shares])
        np.testing.assert_array_equal(rows, EpochOrder(ROWS, 3).rows(range(step * BATCH, (step + 1) * BATCH)))


def test_every_epoch_is_another_permutation():
    order = EpochOrder(ROWS, seed=0)
    epochs = [order.rows(range(epoch * ROWS, (epoch + 1) * ROWS)) for epoch in range(5)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert not np.array_equal(epochs[0], EpochOrder(ROWS, seed=1).rows(range(ROWS)))


def test_rows_do_not_depend_on_earlier_calls():
    order = EpochOrder(ROWS, seed=0)
    late = order.rows(range(3 * ROWS - 4, 3 * ROWS + 4))
    order.rows(range(5))
    np.testing.assert_array_equal(order.rows(range(3 * ROWS - 4, 3 * ROWS + 4)), late)


def test_uniform_numbers_drawn_for_several_batches_at_once_are_those_of_each(monkeypatch):
    at_once = batches(make_arrays(), 7, first_batch=3)
    monkeypatch.setattr("pipelines.training.data.draws.UNIFORMS_AT_ONCE", 3 * BATCH)
    in_threes = batches(make_arrays(), 7, first_batch=3)
    monkeypatch.setattr("pipelines.training.data.draws.UNIFORMS_AT_ONCE", 1)
    single = batches(make_arrays(), 7, first_batch=3)
    for number in range(7):
        assert_equal(at_once[number], single[number])
        assert_equal(in_threes[number], single[number])


def test_rows_at_positions_in_several_epochs_are_those_of_each_epoch():
    epochs = np.concatenate([EpochOrder(ROWS, seed=0).epoch_rows(epoch) for epoch in range(4)])
    for first, count in ((0, 0), (3, 5), (ROWS - 1, 2), (ROWS, ROWS), (5, 3 * ROWS)):
        rows = EpochOrder(ROWS, seed=0).rows(range(first, first + count))
        np.testing.assert_array_equal(rows, epochs[first : first + count])
        assert rows.dtype == np.int64


def test_starting_at_a_batch_equals_skipping_the_earlier_ones():
    arrays = make_arrays()
    for full, resumed in zip(batches(arrays, 7)[4:], batches(arrays, 3, first_batch=4), strict=True):
        assert_equal(full, resumed)


def test_every_position_batch_and_seed_has_its_own_noise_and_timestep():
    arrays = make_arrays()
    drawn = batches(arrays, 3) + batches(arrays, 3, seed=6)
    noise = torch.cat([batch.noise for batch in drawn]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(torch.unique(torch.cat([batch.t for batch in drawn]))) == 6 * BATCH


def test_labels_are_dropped_at_the_given_rate_and_become_the_null_class():
    arrays = make_arrays(rows=2000)
    (kept,) = batches(arrays, 1, size=2000, dropout=0.0)
    (batch,) = batches(arrays, 1, size=2000, dropout=0.3)
    dropped = batch.conditions.labels != kept.conditions.labels
    assert (batch.conditions.labels[dropped] == 10).all() and kept.conditions.labels.max() == 9
    assert abs(dropped.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    (without,) = batches(arrays, 1, size=2000, null_class=None)
    assert torch.equal(without.conditions.labels, kept.conditions.labels)


def test_labels_and_latents_come_from_the_same_row():
    (batch,) = batches(make_arrays(flip=False, log_variance=-100.0), 1, dropout=0.0)
    rows = SCALE.unscale(batch.latents)[:, 0, 0, 0].round().long()
    assert torch.equal(rows % 10, batch.conditions.labels)


def test_about_half_of_the_images_are_flipped_and_use_the_moments_of_the_flipped_image():
    arrays = make_arrays(rows=1000, log_variance=-100.0)
    (batch,) = batches(arrays, 1, size=1000)
    values = SCALE.unscale(batch.latents)[:, 0, 0, 0].round()
    np.testing.assert_array_equal(np.sort(values.abs().numpy()), np.arange(1000))
    assert 0.4 < (values < 0).float().mean() < 0.6
    (plain,) = batches(make_arrays(rows=1000, flip=False, log_variance=-100.0), 1, size=1000)
    assert (SCALE.unscale(plain.latents)[:, 0, 0, 0].round() >= 0).all()
    assert (arrays.moments[:, :2] >= 0).all()  # reading does not write flipped moments into the data set


def test_latents_are_the_scaled_mean_where_the_variance_is_zero():
    arrays = make_arrays(flip=False, log_variance=-np.inf)
    (batch,) = batches(arrays, 1)
    rows = batch_rows(EpochOrder(ROWS, 5), WorkerShare(0, 1, BATCH), 0)
    mean = torch.tensor([0.5, -1.0]).view(2, 1, 1)
    expected = (torch.from_numpy(arrays.moments[rows, :2]).float() - mean) / torch.tensor([2.0, 0.25]).view(2, 1, 1)
    torch.testing.assert_close(batch.latents, expected, rtol=0, atol=1e-5)


def test_every_epoch_draws_new_samples_from_the_posterior():
    arrays = make_arrays(rows=1, flip=False)
    latents = torch.cat([batch.latents for batch in batches(arrays, 3, size=1)])
    assert len(torch.unique(latents.flatten(1), dim=0)) == 3


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_images_do_not_depend_on_their_division_into_files(num_workers, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8)

    def draw(blocks, rank, workers, first_batch=0):
        share = WorkerShare(rank, workers, BATCH)
        rows = image_rows(tmp_path / str(len(blocks)), *blocks, size=4)
        stream = image_batches(rows, latent_shape=(2, 1, 1), seed=1, share=share, first_batch=first_batch, **DRAWS)
        return list(islice(stream, 5 - first_batch))

    full = draw([images], 0, 1)
    blocks = [images[:5], images[5:5], images[5:]]
    parts = [draw(blocks, rank, num_workers) for rank in range(num_workers)]
    for step, batch in enumerate(full):
        assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
        assert torch.equal(batch.noise, torch.cat([part[step].noise for part in parts]))
    assert torch.equal(draw([images], 0, 1, first_batch=4)[0].images, full[4].images)


def test_draws_by_a_counter_have_the_addresses_of_their_batch_and_position(tmp_path):
    arrays = make_arrays(log_variance=0.0)
    address = (5, 4, torch.arange(2, 4))  # seed, batch, positions of the second of four workers

    def uniforms(stream):
        return uniform(address[0], stream, *address[1:], ())

    def normals(stream):
        return normal(address[0], stream, *address[1:], (2, 2, 3))

    (batch,) = batches(arrays, 1, rank=1, num_workers=4, first_batch=4, random="counter")
    rows = batch.rows.view(-1, 1, 1, 1)
    flip = torch.where(uniforms(Stream.FLIP) < 0.5, -1.0, 1.0).view(-1, 1, 1, 1)
    assert torch.equal(batch.t, uniforms(Stream.TIMESTEP)) and torch.equal(batch.noise, normals(Stream.NOISE))
    assert torch.equal(
        batch.conditions.labels, torch.where(uniforms(Stream.CONDITION_DROPOUT) < 0.3, 10, batch.rows % 10)
    )
    torch.testing.assert_close(SCALE.unscale(batch.latents), normals(Stream.POSTERIOR_NOISE) + flip * rows)
    share = WorkerShare(1, 4, BATCH)
    rows = image_rows(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), size=4)
    images = image_batches(rows, latent_shape=(2, 2, 3), seed=5, share=share, first_batch=4, random="counter")
    assert torch.equal(next(images).noise, normals(Stream.AUTOENCODER_NOISE))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_crops_are_at_positions_that_the_counter_draws(num_workers, tmp_path):
    """Pixels that name their own position tell where a crop was taken; all positions occur, and none beyond."""
    rows, columns = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    images = image_rows(tmp_path, image[None].repeat(3, axis=0), size=6)

    def corners(rank, workers):
        share = WorkerShare(rank, workers, BATCH)
        settings = {"latent_shape": (2, 1, 1), "seed": 5, "share": share, "first_batch": 2, "crop": 4}
        crops = [batch.images for batch in islice(image_batches(images, **settings, **DRAWS), 20)]
        assert all(crop.shape[1:] == (3, 4, 4) for crop in crops)
        return torch.stack([((crop[:, :2, 0, 0] + 1) * 127.5).round() for crop in crops])

    found = torch.cat([corners(rank, num_workers) for rank in range(num_workers)], dim=1)
    u = torch.stack([uniform(5, Stream.AUTOENCODER_CROP, number, torch.arange(BATCH), (2,)) for number in range(2, 22)])
    assert torch.equal(found, (3 * u).floor())
    assert {tuple(corner) for corner in found.flatten(0, 1).tolist()} == {(a, b) for a in range(3) for b in range(3)}


def test_micro_batches_together_are_the_batch():
    (batch,) = batches(make_arrays(), 1)
    parts = batch.chunk(3)
    assert [len(part.conditions.labels) for part in parts] == [3, 3, 2]
    assert len(batch.chunk(7)) == 7, "shares differ between elastic workers, and their collectives must not"
    for name in FIELDS:
        assert torch.equal(torch.cat([field(part, name) for part in parts]), field(batch, name))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_prepared_with_threads_of_their_own(threads):
    def train():
        torch.set_num_threads(2)
        of_batches = list(prefetch((torch.get_num_threads() for _ in range(4)), threads=threads))
        return of_batches, torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(train).result() == ([threads] * 4, 2)
    finally:
        torch.set_num_threads(before)


def test_autograds_thread_of_a_gpu_has_the_threads_of_training(monkeypatch):
    """A thread takes the number that was set last; another one would have it compile every block once more."""

    def train():
        torch.set_num_threads(2)
        next(prefetch(iter([1, 2, 3])))
        with ThreadPoolExecutor(1) as autograd:
            return autograd.submit(torch.get_num_threads).result()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(train).result() == 2
    finally:
        torch.set_num_threads(before)


def test_prefetched_batches_are_the_same_and_an_error_comes_in_its_turn():
    def failing():
        yield from range(1, 5)
        raise ValueError("a shard is gone")

    assert list(prefetch(range(1, 30))) == list(range(1, 30))
    assert list(islice(prefetch(iter(int, 1)), 5)) == [0] * 5  # an endless iterator is not exhausted
    stream = prefetch(failing())
    assert list(islice(stream, 4)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="a shard is gone"):
        next(stream)
