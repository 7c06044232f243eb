"""Random draws against published words, an implementation in Python's integers, and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from dit.philox import philox4x32, philox4x32_numpy
from dit.random import CPU_BLOCKS, Stream, normal, uniform
from raydit.errors import InvalidInput

ONES = 2**32 - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
EDGES = (0, 1, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 2, ONES)


def plain_philox(counter, key):
    """Philox4x32-10 in Python's integers, straight from the paper: products of any length."""
    (a, b, c, d), (first, second) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ first, right % 2**32, (left >> 32) ^ d ^ second, left % 2**32
        first, second = (first + 0x9E3779B9) % 2**32, (second + 0xBB67AE85) % 2**32
    return a, b, c, d


def plain_words(seed, stream, step, position, count):
    """The first words that a draw is made of."""
    key = seed % 2**32, seed // 2**32
    blocks = (plain_philox((block, position, step, stream), key) for block in itertools.count())
    return np.array(list(itertools.islice(itertools.chain.from_iterable(blocks), count)), np.float64)


def plain_normal(words):
    """Box-Muller in float64."""
    u, v = ((words + 0.5) / 2**32).reshape(-1, 2).T
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def words_of(counter, key):
    words = [int(word) for word in philox4x32([torch.tensor(word) for word in counter], key)]
    assert philox4x32_numpy(counter, key).tolist() == words
    return words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_words_are_those_that_random123_publishes(counter, key, expected):
    assert tuple(words_of(counter, key)) == plain_philox(counter, key) == expected


def test_words_equal_pythons_integers_at_the_edges_of_a_word():
    counters = list(itertools.product(EDGES, (0, ONES), EDGES, (0, ONES)))
    columns = torch.tensor(counters).unbind(dim=1)
    for key in ((0, 0), (ONES, 2**31), (0x9E3779B9, 7)):
        expected = [list(plain_philox(counter, key)) for counter in counters]
        assert torch.stack(philox4x32(columns, key), dim=1).tolist() == expected
        assert philox4x32_numpy([column.numpy() for column in columns], key).T.tolist() == expected


@pytest.mark.parametrize(
    "address",
    [
        (0, Stream.POSTERIOR_NOISE, 0, 0),
        (7, Stream.STEP_NOISE, 49, 12),
        (2**64 - 1, ONES, ONES, ONES),
        (2**63, 3, 1, 2),
    ],
)
def test_draws_are_the_words_of_their_address(address):
    words = plain_words(*address, count=24)
    expected = ((2 * words + 1) / 2**33).astype(np.float32)
    np.testing.assert_array_equal(uniform(*address, (2, 3, 4)).flatten(), expected)
    np.testing.assert_allclose(normal(*address, (2, 3, 4)).flatten(), plain_normal(words), atol=2e-6, rtol=2e-6)


def test_numbers_of_streams_never_change():
    assert {stream.name: stream.value for stream in Stream} == {
        "POSTERIOR_NOISE": 0,
        "NOISE": 1,
        "TIMESTEP": 2,
        "CONDITION_DROPOUT": 3,
        "FLIP": 4,
        "AUTOENCODER_NOISE": 5,
        "START_NOISE": 6,
        "STEP_NOISE": 7,
        "VALIDATION_NOISE": 8,
        "VALIDATION_TIMESTEP": 9,
        "VALIDATION_POSTERIOR_NOISE": 10,
        "AUTOENCODER_CROP": 11,
    }


@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_do_not_depend_on_the_batch(draw):
    """One by one, in shares and in parts of the computation: the same bits, whatever the threads."""
    shape = (3, 41, 67)
    positions = torch.arange(30) * 1_000_003
    assert len(positions) * math.prod(shape) / 4 > 1.5 * CPU_BLOCKS, "expected more than one part"
    whole = draw(5, Stream.NOISE, 9, positions, shape)
    for size in (1, 7, 16):
        parts = [draw(5, Stream.NOISE, 9, share, shape) for share in positions.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(len(positions))
    assert torch.equal(draw(5, Stream.NOISE, 9, positions[order], shape), whole[order])
    assert torch.equal(draw(5, Stream.NOISE, 9, int(positions[3]), shape), whole[3])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(5, Stream.NOISE, 9, positions, shape), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("stream", [Stream.NOISE, (Stream.TIMESTEP, Stream.NOISE)])
@pytest.mark.parametrize("position", [7, torch.tensor([ONES, 0, 7])])
def test_draws_of_several_steps_are_those_of_each(draw, stream, position):
    steps = (3, ONES, 4, 0)
    for shape in ((2, 3), (3, 5, 7, 11, 37)):  # the latter in several parts, if there are several positions
        several = draw(5, stream, steps, position, shape)
        alone = torch.stack(
            [draw(5, stream, step, position, shape) for step in steps], dim=int(isinstance(stream, tuple))
        )
        assert torch.equal(several, alone) and several.is_contiguous()


@pytest.mark.parametrize("draw", [uniform, normal])
def test_shapes_hold_the_same_numbers_in_c_order(draw):
    positions = torch.tensor([4, 2], dtype=torch.uint8)
    numbers = draw(1, 0, 0, positions, (210,))
    for shape in [(), (1,), (2,), (3,), (5,), (2, 3, 7), (210,), (7, 0), (0,)]:
        found = draw(1, 0, 0, positions, shape)
        assert found.shape == (2, *shape) and found.dtype == torch.float32 and found.is_contiguous()
        assert torch.equal(found, numbers[:, : math.prod(shape)].reshape(found.shape))
        assert torch.equal(draw(1, 0, 0, 2, shape), found[1])
    assert draw(1, 0, 0, positions[:0], (3, 2)).shape == (0, 3, 2)


def test_uniform_numbers_are_within_the_open_interval(monkeypatch):
    """The words that round to 1 are 2^-25 of all, too rare to meet: they replace Philox's."""
    words = np.array([0, 1, ONES - 128, ONES - 127, ONES], np.uint32)
    monkeypatch.setattr("dit.random.philox4x32_numpy", lambda counter, key: np.tile(words, (4, len(counter[1]), 1)))
    below_1 = 1 - 2**-24
    assert uniform(0, 0, 0, 0, (20,))[::4].tolist() == [2**-33, 3 * 2**-33, below_1, below_1, below_1]
    numbers = normal(0, 0, 0, 0, (20,))
    assert numbers.isfinite().all() and numbers.abs().max() <= math.sqrt(66 * math.log(2)) + 1e-6


@pytest.fixture(scope="module")
def addresses():
    """Draws (seed, stream, step, position) of 2^15 elements, which differ from the first in one number each."""
    first = (3, Stream.NOISE, 100, 0)
    changes = [(seed, 0) for seed in (4, 3 + 2**32, 3 + 2**63)] + [(Stream.TIMESTEP, 1), (Stream.POSTERIOR_NOISE, 1)]
    changes += [(step, 2) for step in (101, 0, 100 + 2**31)] + [(position, 3) for position in (1, 2, 255, 2**31)]
    return [first, *((*first[:place], number, *first[place + 1 :]) for number, place in changes)]


@pytest.mark.parametrize(("draw", "law"), [(uniform, scipy.stats.uniform), (normal, scipy.stats.norm)])
def test_draws_follow_their_law(draw, law, addresses):
    numbers = torch.stack([draw(*address, (2**15,)) for address in addresses]).double().flatten().numpy()
    assert scipy.stats.kstest(numbers, law.cdf).pvalue > 1e-3
    for order in range(1, 5):
        deviation = (numbers**order).mean() - law.moment(order)
        variance = law.moment(2 * order) - law.moment(order) ** 2
        assert abs(deviation) < 4 * math.sqrt(variance / numbers.size)


def test_draws_are_uncorrelated(addresses):
    """Between addresses, and between elements of one: each word of a block with the others, and with the next block's.

    Squares too, since the two numbers of a Box-Muller pair have the same radius.
    """
    rows = torch.stack([normal(*address, (2**15,)) for address in addresses]).double()
    shifted = torch.stack([rows[0].roll(shift) for shift in (0, 1, 2, 3, 4, 5, 1024)])
    words = rows.reshape(-1, 4).T
    for numbers in (rows, shifted, words):
        for values in (numbers, numbers.square()):
            off_diagonal = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
            assert off_diagonal.abs().max() < 4.5 / math.sqrt(values.shape[1])


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"seed": -1}, "seed is -1, expected an integer in [0, 2^64)"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected an integer in [0, 2^64)"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"stream": -1}, "stream is -1, expected an integer in [0, 2^32)"),
        ({"stream": 2**32}, "stream is 4294967296"),
        ({"step": -1}, "step is -1"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"step": 1.0}, "step is 1.0"),
        ({"position": -1}, "position is -1"),
        ({"position": 2**32}, "position is 4294967296"),
        ({"position": [0, 1]}, "position is [0, 1]"),
        ({"position": torch.tensor([0, -1])}, "position is -1"),
        ({"position": torch.tensor([2**32, 0])}, "position is 4294967296"),
        ({"position": torch.tensor(1)}, "positions are torch.int64 of shape ()"),
        ({"position": torch.tensor([[1]])}, "positions are torch.int64 of shape (1, 1)"),
        ({"position": torch.tensor([1.0])}, "positions are torch.float32 of shape (1,)"),
        ({"position": torch.tensor([True])}, "positions are torch.bool"),
        ({"shape": (-1,)}, "shape is (-1,), expected no negative side and at most 2^34 elements"),
        ({"shape": (-2, -2)}, "shape is (-2, -2)"),
        ({"shape": (2**17, 2**17, 2)}, "shape is (131072, 131072, 2)"),
    ],
)
def test_addresses_outside_the_counter_are_refused(draw, changed, found):
    with pytest.raises(InvalidInput) as error:
        draw(**{"seed": 0, "stream": 0, "step": 0, "position": 0, "shape": (4,), **changed})
    assert str(error.value).startswith(found)


def check_compiled(device):
    """Compiled code draws what eager code does: uniform numbers to the bit, normal ones to rounding."""
    torch.compiler.reset()
    compiled, compiled_normal = (torch.compile(draw, fullgraph=True) for draw in (uniform, normal))
    traced = torch.compile(uniform, fullgraph=True, backend="eager")
    positions, shape = torch.arange(50, device=device) * 80_000_000, (3, 5)
    # From the second step on, the step is an argument of the compiled code, which serves every step, but one seed.
    for step, stance in ((2, "default"), (3, "default"), (ONES, "fail_on_recompile")):
        address = (5, Stream.NOISE, step, positions, shape, device)
        with torch.compiler.set_stance(stance):
            assert torch.equal(compiled(*address), uniform(*address))
    torch.testing.assert_close(compiled_normal(*address), normal(*address), atol=2e-6, rtol=2e-6)
    several = (5, (Stream.NOISE, Stream.TIMESTEP), range(3, 6), positions, shape, device)
    assert torch.equal(traced(*several), uniform(*several))
    for seed in (5, 2**64 - 1, 2**63):
        assert torch.equal(traced(seed, *address[1:]), uniform(seed, *address[1:]))


@pytest.mark.slow
def test_compiled_draws_equal_eager_ones():
    check_compiled("cpu")


@pytest.mark.gpu
def test_draws_on_a_gpu_equal_those_on_a_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    positions, shape = torch.arange(300) * 7_000_001, (4, 33, 31)
    on_gpu, on_cpu = (
        [draw(2**63 + 1, 1, 2**31, positions, shape, device) for draw in (uniform, normal)]
        for device in ("cuda", "cpu")
    )
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], atol=2e-6, rtol=2e-6)
    assert torch.equal(normal(2**63 + 1, 1, 2**31, positions[5:70].cuda(), shape, "cuda"), on_gpu[1][5:70])
    check_compiled("cuda")
