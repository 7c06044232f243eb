"""What is checked before images are scored: references, weights, functions, and that held-out images are no others."""

from functools import lru_cache

from evaluation.extractor_names import extractor_kind
from evaluation.extractors import ExtractorIdentity, create_extractor, fetch_weights
from evaluation.protocol import EvaluationProtocol
from evaluation.score import explain_missing, summarize_missing
from pipelines.scoring.references import MAX_REFERENCE_FEATURES, load_given_reference
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput


def check_scoring_inputs(settings: ScoringSettings, protocol: EvaluationProtocol) -> None:
    """Check before any work that the given references fit and that the extractors' weights exist.

    protocol: that of the first extractor.
    Raises InvalidInput for a reference of another extractor, image size or crop, NotFound for missing weights.
    """
    first, *others = settings.each_extractor
    _check_inputs(
        first, ExtractorIdentity(protocol.extractor, protocol.extractor_sha256, protocol.extractor_preprocessing)
    )
    for each in others:
        _check_inputs(each, each.extractor)


def check_scoring_settings(settings: ScoringSettings) -> None:
    """Check the same for the protocols that a recipe describes, before there is a checkpoint to score."""
    for each in settings.each_extractor:
        _check_inputs(each, each.extractor)


def _check_inputs(settings: ScoringSettings, extractor: ExtractorIdentity) -> None:
    images, evaluate = settings.images, settings.evaluate
    if settings.reference:
        reference = load_given_reference(settings.reference)
        reference.check_compatible(*extractor[:2], images.size, images.crop, extractor.preprocessing)
    fetch_weights(evaluate.extractor, settings.extractor_weights)
    if extractor_kind(evaluate.extractor) == "function" and not evaluate.gpus_per_worker:
        _try_function(evaluate.extractor, extractor.sha256, images.size)


@lru_cache
def _try_function(name: str, sha256: str, image_size: int) -> None:
    """Call a user's function on a few images, once for each state of its source; workers do so too, on their devices.

    Raises InvalidInput if it does not fit.
    """
    create_extractor(name, image_size=image_size, sha256=sha256)


def check_real_images(settings: ScoringSettings, num_images: int, num_samples: int) -> list[str]:
    """Return in words which metrics cannot be computed, before any are. Raises InvalidInput if none can.

    num_images: training images, which give the reference unless another is given.
    """
    lines = [_check_real_images(each, num_images, num_samples) for each in settings.each_extractor]
    return list(dict.fromkeys(line for part in lines for line in part))


def _check_real_images(settings: ScoringSettings, num_images: int, num_samples: int) -> list[str]:
    if settings.reference:
        features = load_given_reference(settings.reference).features
        return [] if features is None else summarize_missing(explain_missing(num_samples, len(features)))
    if num_images < 2:
        raise InvalidInput(
            f"images.path: found {num_images} training images in {settings.images.path} to compare samples with",
            "at least 2, and many more for a score that means something",
            "add images, or give reference statistics (evaluate.reference)",
        )
    return summarize_missing(explain_missing(num_samples, min(num_images, MAX_REFERENCE_FEATURES)))
