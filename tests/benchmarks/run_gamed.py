"""A gamed score: judge images that were optimised for EfficientNet-Lite0's Frechet distance by other feature spaces and
by a classifier.

    python tests/benchmarks/run_gamed.py [OUTPUT]

About four minutes on one core. Writes results/gamed.md and results/gamed.png. An interrupted run resumes.

The digits are split into training images, of which the first are the reference, and held-out images. Honest samples are
draws from a Gaussian for each digit, fitted to the training pixels. Gamed samples begin as draws from one Gaussian for
all digits, which are blurs of no digit, and their pixels then descend the Frechet distance of their Lite0 features.
Ratios to real images are taken in a few random directions of each feature space, because ratios need more than twice as
many images as dimensions.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from results import commit, machine
from sklearn.svm import SVC
from study import RESULTS, table

from evaluation.extractors import FeatureExtractor, Features, create_extractor
from evaluation.merge_reports import merge_reports
from evaluation.metric_names import metric_name
from evaluation.metrics import frechet_distance, frechet_distance_to
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from evaluation.statistics import FeatureStatistics
from pipelines.config.recipe import ImagesConfig
from pipelines.images.grids import encode_png, labelled_grid
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.scoring.reports.build_report import build_report

TARGET, OTHERS = "efficientnet-lite0", ("efficientnet-lite1", "efficientnet-lite2")
COUNT, REFERENCE, SIZE, DIRECTIONS = 120, 400, 32, 48
PASSES, BATCH, LEARNING_RATE = 10, 8, 0.05
NUM_PICTURES = 12


def main(output: str = "outputs/gamed") -> None:
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    training, training_labels, held_out, held_out_labels = load_digits()
    reference = training[:REFERENCE]
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % 10
    honest = np.concatenate(
        [draw_gaussian_images(training[training_labels == digit], COUNT // 10, rng) for digit in range(10)]
    )
    honest = honest.reshape(10, COUNT // 10, SIZE, SIZE).swapaxes(0, 1).reshape(COUNT, SIZE, SIZE)
    start, target = draw_gaussian_images(training, COUNT, rng), create_extractor(TARGET)
    gamed = optimise(start, extract(target, reference, folder / "reference-0.npy"), target, folder / "pixels.npy")
    image_sets = {
        "real images, held out": held_out,
        "honest samples": honest,
        "before gaming": start,
        "gamed samples": gamed,
    }
    classifier = SVC().fit(training.reshape(len(training), -1) / 255, training_labels)
    truth = {name: held_out_labels if name.startswith("real") else labels for name in image_sets}
    recognised = {
        name: float((classifier.predict(images.reshape(COUNT, -1) / 255) == truth[name]).mean())
        for name, images in image_sets.items()
    }
    write(image_sets, *score(folder, reference, image_sets), recognised)


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, 32, 32) uint8 and labels of training digits, then of COUNT held-out ones."""
    images = ImagesConfig(path="digits", size=SIZE)
    listing = open_source(images).listing()
    pixels, _, _ = read_cropped(images, listing.keys)
    order = np.random.default_rng(0).permutation(len(listing))
    grey, held_out = pixels[..., 0], order[:COUNT]
    return grey[order[COUNT:]], listing.labels[order[COUNT:]], grey[held_out], listing.labels[held_out]


def draw_gaussian_images(images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw images from a Gaussian that is fitted to the pixels of given images."""
    flat = images.reshape(len(images), -1).astype(float)
    left, scales, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    weights = rng.standard_normal((count, len(scales))) * scales / np.sqrt(len(flat) - 1)
    return (flat.mean(axis=0) + weights @ directions).clip(0, 255).round().astype(np.uint8).reshape(count, SIZE, SIZE)


def to_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))[:, None].expand(-1, 3, -1, -1)


def extract(extractor: FeatureExtractor, images: np.ndarray, file: Path) -> np.ndarray:
    """Return the features of images, cached in a file."""
    if not file.exists():
        np.save(file, extractor(to_batch(images)).features)
    return np.load(file)


def optimise(start: np.ndarray, reference: np.ndarray, extractor: FeatureExtractor, file: Path) -> np.ndarray:
    """Return images whose features descend the Frechet distance to those of the reference.

    Its gradient with respect to the feature f of one of N images is 2 / N (f - T(f)), where T is the optimal transport
    map between the two Gaussians: every feature is pulled towards its own target.
    """
    done = len(list(file.parent.glob("pass-*.npz")))
    logits = torch.logit(torch.from_numpy(start / 255.0).float().clamp(0.02, 0.98))
    moments = [torch.zeros_like(logits), torch.zeros_like(logits)]
    if done:
        with np.load(file.parent / f"pass-{done:02d}.npz") as saved:
            logits, *moments = (torch.from_numpy(saved[name]) for name in ("logits", "first", "second"))
    root, mean = square_root(np.cov(reference.T)), reference.mean(axis=0)
    features = extract(extractor, start, file.parent / "start-0.npy") if not done else None
    for number in range(done + 1, PASSES + 1):
        started = time.perf_counter()
        if features is None:
            features = extractor(to_batch(to_pixels(logits))).features
        targets = transport(features, mean, root)
        features, gradient = features.copy(), torch.zeros_like(logits)
        for first in range(0, len(logits), BATCH):
            part = slice(first, first + BATCH)
            batch = logits[part].clone().requires_grad_()
            found = extractor.forward((255 * torch.sigmoid(batch))[:, None].expand(-1, 3, -1, -1)).features
            (found - torch.from_numpy(targets[part]).float()).square().sum().backward()
            gradient[part], features[part] = batch.grad, found.detach().numpy()
        adam(logits, gradient, moments, number)
        arrays = {"logits": logits, "first": moments[0], "second": moments[1]}
        np.savez(file.parent / f"pass-{number:02d}.npz", **{name: value.numpy() for name, value in arrays.items()})
        distance = frechet_distance(features.mean(axis=0), np.cov(features.T), mean, root @ root)
        print(f"pass {number:2d}: {TARGET} {distance:.2f} ({time.perf_counter() - started:.0f} s)", flush=True)
    return to_pixels(logits)


def to_pixels(logits: torch.Tensor) -> np.ndarray:
    return (255 * torch.sigmoid(logits)).round().to(torch.uint8).numpy()


def adam(values: torch.Tensor, gradient: torch.Tensor, moments: list[torch.Tensor], step: int) -> None:
    """Take a step of Adam in place."""
    first, second = moments
    first.lerp_(gradient, 0.2)
    second.lerp_(gradient.square(), 0.05)
    values -= LEARNING_RATE * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)


def square_root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def transport(features: np.ndarray, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Map each feature by the optimal transport from the features' Gaussian to the reference's."""
    centred = features - features.mean(axis=0)
    values, vectors = np.linalg.eigh(root @ np.cov(features.T) @ root)
    kept = values > 1e-10 * values[-1]
    inverse = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    return mean + centred @ (root @ inverse @ root)


def score(
    folder: Path, reference: np.ndarray, image_sets: dict[str, np.ndarray]
) -> tuple[dict[str, list[float]], dict[str, EvaluationReport]]:
    """Return, for each set, distances in full feature spaces, and reports in random projections of them."""
    distances: dict[str, list[float]] = {name: [] for name in image_sets}
    reports: dict[str, list[EvaluationReport]] = {name: [] for name in image_sets}
    for name in (TARGET, *OTHERS):
        extractor, number = create_extractor(name), name[-1]
        features = {
            title: extract(extractor, images, folder / f"{title.replace(' ', '-').replace(',', '')}-{number}.npy")
            for title, images in image_sets.items()
        }
        real = extract(extractor, reference, folder / f"reference-{number}.npy")
        distance = frechet_distance_to(real.mean(axis=0), np.cov(real.T))
        directions = np.random.default_rng(1).standard_normal((real.shape[1], DIRECTIONS)) / np.sqrt(DIRECTIONS)
        protocol = EvaluationProtocol(
            num_samples=COUNT,
            decoder="none",
            extractor=f"{name}-in-{DIRECTIONS}",
            extractor_sha256=extractor.weights_sha256,
            reference_digest="digits",
        )
        statistics, held_out = reference_of(real @ directions, protocol.extractor), next(iter(features.values()))
        for title, array in features.items():
            distances[title].append(distance(array.mean(axis=0), np.cov(array.T)))
            samples, real_images = (Features(side @ directions) for side in (array, held_out))
            report = build_report(protocol, samples, statistics, real_images, checkpoint=title, digest=title)
            reports[title].append(report)
    return distances, {name: merge_reports(parts) for name, parts in reports.items()}


def reference_of(features: np.ndarray, extractor: str) -> ReferenceStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return ReferenceStatistics(
        n=len(features), mu=statistics.mean, sigma=statistics.cov, extractor=extractor, extractor_sha256="x"
    )


def write(
    image_sets: dict[str, np.ndarray],
    distances: dict[str, list[float]],
    reports: dict[str, EvaluationReport],
    recognised: dict[str, float],
) -> None:
    names = (TARGET, *OTHERS)
    head = ["images", *(f"distance, Lite{name[-1]}" for name in names), *(f"ratio, Lite{name[-1]}" for name in names)]
    rows = []
    for title, report in reports.items():
        ratios = [metric_name("ratio_fd", f"{name}-in-{DIRECTIONS}", COUNT) for name in names]
        cells = [f"{report.metrics[name]:.2f} \u00b1 {report.errors[name]:.2f}" for name in [*ratios, f"fdr_{COUNT}"]]
        rows.append([title, *(f"{value:.1f}" for value in distances[title]), *cells, f"{100 * recognised[title]:.0f}%"])
    described = "; ".join(f"{name}: {value}" for name, value in machine().items())
    text = (
        f"Images that were optimised for the Frechet distance of EfficientNet-Lite0 alone, commit {commit()}: {COUNT} "
        "of each kind against the same digits, distances in whole feature spaces, ratios to real images and their mean "
        f"in {DIRECTIONS} random directions of each, and what share a digit classifier recognises as the digits that "
        "they should be. Written by `tests/benchmarks/run_gamed.py`; the pictures are in [gamed.png](gamed.png).\n\n"
        f"{described}\n\n"
    )
    (RESULTS / "gamed.md").write_text(text + table([*head, "mean ratio", "recognised"], rows))
    grid = labelled_grid(
        [(name, np.repeat(images[:NUM_PICTURES, ..., None], 3, axis=3)) for name, images in image_sets.items()]
    )
    (RESULTS / "gamed.png").write_bytes(encode_png(grid))


if __name__ == "__main__":
    main(*sys.argv[1:])
