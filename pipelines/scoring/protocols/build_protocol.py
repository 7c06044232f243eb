"""From a recipe and a checkpoint to the protocol by which samples are drawn and scored."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster import storage
from cluster.storage.ownership import is_own
from dit.config import RandomKind
from dit.time_shift import shift_factor
from evaluation.protocol import MIN_SAMPLES, EvaluationProtocol
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.console import say
from pipelines.scoring.checks import check_sampling_steps
from pipelines.scoring.real_images.references import RealImages, reference_digest, reference_overrides
from pipelines.scoring.settings import ScoringSettings
from pipelines.tracking.store import gets_credentials
from raydit.errors import InvalidInput


def evaluation_protocol(
    settings: ScoringSettings, opened: LocatedCheckpoint, scoring: dict[str, Any] | None = None
) -> EvaluationProtocol:
    """Return the protocol that a recipe's [evaluate] asks for with a checkpoint; of several extractors, the first's.

    scoring: the result of scoring_fields, if it is known already: it takes a listing of all images.
    Raises what sampling_protocol, check_sample_size and check_sampling_steps raise, and NotFound if extractor weights,
    images or reference are missing.
    """
    check_sample_size(settings.images, opened)
    check_sampling_steps(settings.evaluate, opened.record.process_kind)
    return replace(
        sampling_protocol(settings.evaluate, settings.seed, opened, settings.random),
        num_samples=settings.evaluate.num_samples,
        **(scoring_fields(settings) if scoring is None else scoring),
    )


def evaluation_protocols(settings: ScoringSettings, first: EvaluationProtocol) -> list[EvaluationProtocol]:
    """Return the protocol of each extractor, `first` being the first one's: that of a run with this extractor alone.

    They differ in the extractor, its weights and the reference. Raises NotFound if one of these is missing.
    """
    return [
        first,
        *(replace(first, **scoring_fields(each)) for each in settings.each_extractor[1:]),
    ]


def scoring_fields(settings: ScoringSettings) -> dict[str, Any]:
    """Return the fields of a protocol that say how samples are scored by the (first) extractor."""
    return {
        "extractor": settings.extractor.name,
        "extractor_sha256": settings.extractor.sha256,
        "extractor_preprocessing": settings.extractor.preprocessing,
        "reference_digest": reference_digest(settings),
        "validation_digest": validation_digest(settings),
    }


def validation_digest(settings: ScoringSettings) -> str | None:
    """Return the digest of the held-out images if images.validation names them, for the protocol; None otherwise.

    Only then: a share of the images follows from those in the reference.
    """
    if not settings.images.path or settings.images.validation is None:
        return None
    real = RealImages.of(settings)
    return real.digest(real.held_out)


def protocols_identity(protocols: Sequence[EvaluationProtocol]) -> dict[str, Any]:
    """Return what the identity of an evaluation's run holds of its protocols, the first extractor's first."""
    first, *further = (protocol.protocol_id for protocol in protocols)
    return {"protocol": first, **({"further_protocols": further} if further else {})}


def check_sample_size(images: ImagesConfig, opened: LocatedCheckpoint) -> None:
    """Raise InvalidInput if a checkpoint's samples have another size than the images that they are compared with."""
    record = opened.record
    side = record.model_config.latent_size[0] * record.autoencoder.downsample
    if side != images.size:
        raise InvalidInput(
            f"images.size: found {images.size}",
            f"{side}, the size of the samples of {opened.origin}",
            f"set images.size = {side}, or choose a checkpoint for images of {images.size} pixels",
        )


def sampling_protocol(
    evaluate: EvaluateConfig, seed: int, opened: LocatedCheckpoint, random: RandomKind | None = None
) -> EvaluationProtocol:
    """Return a protocol for samples that are not scored: it needs neither real images nor an extractor.

    seed, random: of the recipe. Sample i is that of evaluation_protocol with the same settings. Raises InvalidInput if
    the autoencoder is not the checkpoint's, NotFound if the checkpoint lacks the weights, and as open_guide.
    """
    from pipelines.scoring.samples.guide import open_guide

    decoder = decoder_digest(opened)
    opened.weights_files(evaluate.weights)
    guide, model = open_guide(evaluate, opened), opened.record.model_config
    shift = evaluate.time_shift
    return EvaluationProtocol(
        seed=seed,
        random=random,
        labels=evaluate.labels,
        sampler=evaluate.sampler,
        sampling_steps=evaluate.sampling_steps,
        time_shift=None
        if shift is None
        else shift_factor(shift, (model.in_channels, *model.latent_size), model.num_tokens),
        sde_diffusion=evaluate.sde_diffusion,
        sde_norm=evaluate.sde_norm,
        cfg_scale=evaluate.cfg_scale,
        cfg_channels=evaluate.cfg_channels,
        cfg_interval=evaluate.cfg_interval,
        autoguidance=None if guide is None else guide.digest,
        autoguidance_weights=evaluate.autoguidance_weights,
        weights=evaluate.weights,
        dtype=evaluate.dtype,
        decoder_dtype=evaluate.decoder_dtype,
        decoder=decoder,
        extractor="none",
        extractor_sha256="none",
        reference_digest="none",
    )


def decoder_digest(opened: LocatedCheckpoint) -> str:
    """Return the digest of the autoencoder that decodes a checkpoint's samples.

    Raises InvalidInput if the autoencoder that is there is not the checkpoint's.
    """
    from dit.autoencoder import describe_autoencoder
    from pipelines.checkpoints.autoencoder import checkpoint_autoencoder

    folder = checkpoint_autoencoder(opened)
    # As recorded, where the same weights may have been saved again since then.
    return opened.record.autoencoder.sha256 or describe_autoencoder(folder)["sha256"]


def images_protocol(settings: ScoringSettings, num_images: int) -> EvaluationProtocol:
    """Return the protocol of images from another source: their number, and how they are scored, are all we know.

    Raises InvalidInput for fewer images than a protocol needs.
    """
    if num_images < MIN_SAMPLES:
        raise InvalidInput(
            f"found {num_images} images to score",
            f"at least {MIN_SAMPLES}, one for each split of the Inception Score",
            "add images",
        )
    return EvaluationProtocol(
        num_samples=num_images,
        sampler="unknown",
        sampling_steps=1,
        decoder="unknown",
        uint8_rule="unknown",
        **scoring_fields(settings),
    )


def checkpoint_recipe(opened: LocatedCheckpoint, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe that a checkpoint records, with the checkpoint's present location as its output.

    An imported checkpoint records no recipe: its config gives one, and its output is the folder that it lies in. A
    tracking server that somebody else's names is left out if this user's credentials would be sent to it.
    """
    from pipelines.config.reader import apply_override, validate_recipe

    content = {**recorded_content(opened), "output": opened.output}
    if opened.record.recipe is None:
        overrides = (*_reference_settings(overrides), *overrides)
    recorded = str(content.get("tracking", {}).get("uri", ""))
    _drop_overruled_extractors(content, overrides)
    for override in overrides:
        apply_override(content, override)
    config = validate_recipe(content)
    if recorded and config.tracking.uri == recorded and gets_credentials(recorded) and not _is_own(opened):
        say(
            "tracking",
            f"{recorded}, which the recipe of {opened.origin} names, is not used, because your credentials in "
            f"MLFLOW_TRACKING_* are not known to be for it; if they are, add --set tracking.uri={recorded}",
        )
        return replace(config, tracking=replace(config.tracking, uri=""))
    return config


def _drop_overruled_extractors(content: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Remove evaluate.extractor or evaluate.extractors of a recorded recipe if an override sets the other alone."""
    from pipelines.config.overrides import read_overrides

    given = read_overrides(overrides).get("evaluate", {}).keys() & {"extractor", "extractors"}
    if len(given) == 1:
        content.get("evaluate", {}).pop("extractor" if given == {"extractors"} else "extractors", None)


def _is_own(opened: LocatedCheckpoint) -> bool:
    """Return whether this user wrote a checkpoint; of one in an object store nobody knows."""
    return storage.is_local(opened.origin) and is_own(str(opened.path / "config.json"))


def recorded_content(opened: LocatedCheckpoint) -> dict[str, Any]:
    """Return the content of the recipe that a checkpoint records, or that its record gives if it was imported."""
    from pipelines.checkpoints.importing import recipe_for_imported

    recorded = opened.record.recipe
    return recipe_for_imported(opened.record) if recorded is None else copy.deepcopy(dict(recorded))


def _reference_settings(overrides: tuple[str, ...]) -> list[str]:
    """Return the overrides that the reference statistics among some overrides stand for: extractor and crop."""
    from pipelines.config.overrides import read_overrides

    reference = read_overrides(overrides).get("evaluate", {}).get("reference")
    if not isinstance(reference, str):
        return []
    return [known for known in reference_overrides(reference) if not known.startswith("images.size")]
