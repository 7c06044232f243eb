"""Sentences that help to read the scores of a report."""

from collections.abc import Mapping, Sequence

from evaluation.metric_names import MEAN_RATIO, format_count, parse_metric_name
from evaluation.protocol import EvaluationProtocol
from evaluation.ratios import RatioRow

LOW_PRECISION = 0.05
"""Precision or recall below it needs an explanation."""
FEW_SAMPLES = 1000
"""With fewer samples than this, low precision or recall may be due to their number alone."""


def explain_low_precision(metrics: Mapping[str, float], protocol: EvaluationProtocol) -> str:
    """Return a sentence on precision and recall of all samples that are near 0; empty if neither is."""
    parsed = {name: parse_metric_name(name) for name in metrics}
    low = [
        parts.kind.name
        for name, parts in parsed.items()
        if parts.kind.name in ("precision", "recall")
        and parts.num_samples == protocol.num_samples
        and metrics[name] < LOW_PRECISION
    ]
    if not low:
        return ""
    names, num_samples = " and ".join(low).capitalize(), protocol.num_samples
    if num_samples < FEW_SAMPLES:
        return (
            f"{names} near 0 may be due to the number of samples: {num_samples:,} are too few to cover these "
            "distributions."
        )
    return (
        f"{names} near 0: look at the samples. If they are unlike the real images, as after little "
        f"training, the value is correct. If they look good, the features of {protocol.extractor} do not fit these "
        "images: a slight difference that all samples share, such as the autoencoder's blur, is then larger than the "
        "distance from a real image to its nearest ones. If so, compare checkpoints by the Frechet distance instead."
    )


def name_extractors(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Return sentences about the scores by several extractors, each once; one that is not about all begins with a name.

    sentences: those about each extractor, by its name; empty ones are left out.
    """
    shared = set.intersection(*map(set, sentences.values()))
    named = [
        text if text in shared else f"{extractor}: {text}"
        for extractor, texts in sentences.items()
        for text in texts
        if text
    ]
    return list(dict.fromkeys(named))


def explain_ratios(rows: Sequence[RatioRow]) -> str:
    """Return a warning if ratios to real images contradict each other by more than their errors; empty otherwise.

    Where a ratio is below 1, samples are nearer to the reference than real images are. If their ratio in another
    feature space is above 1, the model has been optimised for the first space.
    """
    spaces = [row for row in rows if row.value is not None and parse_metric_name(row.name).kind != MEAN_RATIO]
    nearer = [row for row in spaces if _deviation_from_1(row) < 0]
    farther = [row for row in spaces if _deviation_from_1(row) > 0]
    if not nearer or not farther:
        return ""
    listed = [" and ".join(f"{row.title} ({row.value:.3g})" for row in each) for each in (nearer, farther)]
    return (
        f"Samples score better than real images in {listed[0]} and worse in {listed[1]}, by more than the errors. "
        "This happens when a model was optimised for one feature space. Judge it by the others."
    )


def _deviation_from_1(row: RatioRow) -> float:
    """Return by how much a ratio is above or below 1, 0 within its error or if the error is unknown."""
    if row.value is None or row.error is None or abs(row.value - 1) <= row.error:
        return 0.0
    return row.value - 1


def explain_shares(
    metrics: Mapping[str, float], real_baseline: Mapping[str, float], reconstructions: Mapping[str, float]
) -> str:
    """Return how much of the Frechet distance is the autoencoder's and how much the model's, at the largest common N.

    metrics, real_baseline, reconstructions: scores of samples, of held-out images, and of these encoded and decoded.
    Real images have a distance too, which is that of so few images. Empty without reconstructions. Distances do not add
    up exactly; the shares are the steps from real images to reconstructions, and from these to samples.
    """
    distances = [_frechet_distances(each) for each in (real_baseline, reconstructions, metrics)]
    common = set.intersection(*(set(each) for each in distances))
    if not common:
        return ""
    count = max(common)
    real, reconstructed, generated = (each[count] for each in distances)
    return (
        f"Of the Frechet distance of {generated:.3g} at N = {format_count(count)}, {real:.3g} is that of real images, "
        f"{reconstructed - real:.3g} comes from the autoencoder and {generated - reconstructed:.3g} from the model."
    )


def _frechet_distances(metrics: Mapping[str, float]) -> dict[int, float]:
    """Return the Frechet distances among the metrics of one extractor, by N."""
    parsed = {name: parse_metric_name(name) for name in metrics}
    return {parts.num_samples: metrics[name] for name, parts in parsed.items() if parts.kind.name == "fd"}
