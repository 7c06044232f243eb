"""Closeness of images to their originals, against closed forms and a loop over positions."""

import numpy as np
import pytest
import torch

from evaluation.image_quality import ssim, structural_similarities
from raydit.errors import InvalidInput


def images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ssim_by_loop(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 position by position, with a two-dimensional window; x, y: (H, W)."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (each[top : top + 11, left : left + 11].astype(float) for each in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(found))


def test_structural_similarity_is_that_of_the_paper_position_by_position():
    x = images((3, 17, 20, 2))
    y = np.clip(x * 0.8 + images(x.shape, seed=1) * 0.2, 0, 255).astype(np.uint8)
    found = structural_similarities(torch.from_numpy(x), torch.from_numpy(y))
    expected = [np.mean([ssim_by_loop(a[..., c], b[..., c]) for c in range(2)]) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert ssim(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 255), (100, 120)])
def test_structural_similarity_of_plain_images_is_that_of_their_luminance(first, second):
    x, y = (torch.full((1, 12, 12, 3), value, dtype=torch.uint8) for value in (first, second))
    c1 = (0.01 * 255) ** 2
    expected = (2 * first * second + c1) / (first**2 + second**2 + c1)
    assert ssim(x, y) == pytest.approx(expected, abs=1e-12)


def test_structural_similarity_is_symmetric_1_for_equal_images_and_one_by_one():
    x, y = torch.from_numpy(images((70, 11, 13, 3))), torch.from_numpy(images((70, 11, 13, 3), seed=1))
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-15)
    assert ssim(x, y) == ssim(y, x)
    alone = torch.cat([structural_similarities(x[k : k + 1], y[k : k + 1]) for k in range(len(x))])
    torch.testing.assert_close(alone, structural_similarities(x, y), rtol=0, atol=1e-14)
    assert 0 < ssim(x[:, :8, :8], (x[:, :8, :8] // 2 + 60)) < 1  # smaller than the window


def test_structural_similarity_refuses_other_shapes():
    x = torch.zeros(2, 12, 12, 3)
    with pytest.raises(InvalidInput, match="its own reconstruction"):
        ssim(x, x[:1])
    with pytest.raises(InvalidInput, match="N > 0"):
        ssim(x[:0], x[:0])
