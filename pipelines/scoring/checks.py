"""What is checked before images are scored: weights, references, extractors, and held-out images, which may not have
been trained on."""

from functools import lru_cache

from cluster import storage
from dit.sampler_names import NUM_TIMESTEPS, most_steps
from evaluation.extractors import ExtractorIdentity, create_extractor, fetch_weights
from evaluation.features.extractor_names import extractor_kind
from evaluation.protocol import MIN_SAMPLES, EvaluationProtocol
from evaluation.score import explain_missing, summarize_missing
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.images.held_out import find_equal_images
from pipelines.latents.dataset import MANIFEST, LatentDataset
from pipelines.latents.recipe_match import find_leaked, recorded_share
from pipelines.latents.shards import recorded_keys
from pipelines.scoring.real_images.references import MAX_REFERENCE_FEATURES, RealImages, load_given_reference
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.samples.guide import open_guide
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput

MAX_COMPARED = 64
"""Held-out images with the name and length of a training image that are compared with it, pixel by pixel."""


def check_scoring_inputs(settings: ScoringSettings, protocol: EvaluationProtocol) -> None:
    """Check before any work that the given references fit and that the extractors' weights exist.

    protocol: that of the first extractor.
    Raises InvalidInput for a reference of another extractor, image size or crop, NotFound for missing weights.
    """
    refuse_seen_images(settings)
    refuse_larger_share(settings)
    first, *others = settings.each_extractor
    _check_inputs(
        first, ExtractorIdentity(protocol.extractor, protocol.extractor_sha256, protocol.extractor_preprocessing)
    )
    for each in others:
        _check_inputs(each, each.extractor)


def check_weights(opened: LocatedCheckpoint, evaluate: EvaluateConfig, protocol: EvaluationProtocol) -> None:
    """Compare the weights that samples are drawn with, those of a guide included, with their digests, which reads them.

    Workers would find damaged weights only after the features of real images. Raises NotFound or InvalidInput.
    """
    opened.require_intact(protocol.weights)
    if protocol.autoguidance is not None and (guide := open_guide(evaluate, opened)) is not None:
        guide.require_intact(protocol.autoguidance_weights or protocol.weights)


def check_scoring_settings(settings: ScoringSettings) -> None:
    """Check the same for the protocols that a recipe describes, before there is a checkpoint to score."""
    refuse_seen_images(settings)
    for each in settings.each_extractor:
        _check_inputs(each, each.extractor)


def check_num_samples(evaluate: EvaluateConfig) -> None:
    """Raise InvalidInput if a recipe asks for fewer samples than a protocol can have."""
    if evaluate.num_samples < MIN_SAMPLES:
        raise InvalidInput(
            f"evaluate.num_samples: found {evaluate.num_samples}",
            f"at least {MIN_SAMPLES}, one for each split of the Inception Score",
            "set evaluate.num_samples",
        )


def check_sampling_steps(evaluate: EvaluateConfig, kind: str) -> None:
    """Raise InvalidInput if a recipe asks for more steps than its sampler takes on a process of this kind."""
    most = most_steps(evaluate.sampler, kind)
    if most is not None and evaluate.sampling_steps > most:
        raise InvalidInput(
            f"evaluate.sampling_steps: found {evaluate.sampling_steps} with the sampler {evaluate.sampler!r}",
            f"at most {most}, because a diffusion has {NUM_TIMESTEPS} timesteps",
            "set evaluate.sampling_steps",
        )


def refuse_seen_images(settings: ScoringSettings) -> None:
    """Raise InvalidInput if images.validation holds images that the training's latents are of.

    Those are images with a key of the latents that are also equal to the training image of this key, or whose training
    image has been moved away since. Other folders often use the same names, so a key alone says nothing.
    """
    if not settings.images.path or settings.images.validation is None:
        return
    real = RealImages.of(settings)
    latents = settings.latents or storage.join(settings.output, "latents")
    has_latents = storage.exists(storage.join(latents, MANIFEST))
    seen = recorded_keys(LatentDataset.open(latents)) if has_latents else {*real.training.keys}
    stamps = dict(zip(real.training.keys, real.training.stamps.tolist(), strict=True))
    pairs = list(zip(real.held_out.keys, real.held_out.stamps.tolist(), strict=True))
    moved = [key for key, _ in pairs if key in seen and key not in stamps]
    equal = [position for position, (key, stamp) in enumerate(pairs) if key in seen and stamps.get(key) == stamp]
    compared = spaced_positions(len(equal), min(len(equal), MAX_COMPARED))
    chosen = real.held_out.take([equal[position] for position in compared])
    if found := moved or find_equal_images(real.settings.images, real.training, chosen)[0]:
        raise InvalidInput(
            f"images.validation: found {found[0]!r} in {settings.images.validation!r}, one of {len(found):,} images "
            "that training has seen",
            "images that nothing trains on",
            "remove them, or train again without them; if they are others of the same names, rename them",
        )


def refuse_larger_share(settings: ScoringSettings) -> None:
    """Raise InvalidInput if images.held_out holds out images that the training's latents are of.

    These were encoded with a smaller share then. Where they are not there any more, nothing is known.
    """
    share, latents = settings.images.held_out, settings.latents or storage.join(settings.output, "latents")
    if not settings.images.path or not share or not storage.exists(storage.join(latents, MANIFEST)):
        return
    dataset = LatentDataset.open(latents)
    if not (leaked := find_leaked(dataset, share)):
        return
    if found := [key for key in RealImages.of(settings).held_out.keys if key in leaked]:
        raise InvalidInput(
            f"images.held_out: found {share:g}, which holds out {found[0]!r}, one of {len(found):,} images that "
            "training has seen",
            f"at most {recorded_share(dataset):g}, as when the latents were encoded",
            "set it to that, or train again without these images",
        )


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
