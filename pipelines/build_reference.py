"""The build-reference job: statistics of real images in a file of their own."""

from functools import partial

from cluster import storage
from evaluation.reference import ReferenceStatistics
from pipelines.artifacts import digest_of
from pipelines.config.recipe import Recipe
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.checks import check_scoring_settings
from pipelines.scoring.real_images.references import RealImages, compute_reference, save_reference
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.shards import compute_shards, make_shards, split_listing, temporary_shard_dir
from pipelines.stage import StageContext
from raydit.errors import InvalidInput


def build_reference(config: Recipe, out: str, *, address: str | None = None) -> ReferenceStatistics:
    """Extract features of all of a recipe's images, and write their statistics to a path or URI.

    config: its output is the folder of the work (see work_folder), which is removed at the end; after an interruption
    the same call resumes there. address: of Ray. Raises AlreadyExists if there is a file at `out`, and InvalidInput for
    several extractors.
    """
    storage.refuse_existing(out)
    settings = ScoringSettings.from_recipe(config)
    images, evaluate = settings.images, settings.evaluate
    if len(evaluate.extractors) > 1:
        raise InvalidInput(
            f"evaluate.extractors: found {len(evaluate.extractors)} extractors",
            "one, because a file holds the reference of one",
            "build a file for each, with --extractor NAME",
        )
    training = RealImages.of(settings).training
    check_scoring_settings(settings)
    shards = make_shards(settings.output, split_listing(training, evaluate.shard_rows))
    with StageContext(config, address=address) as context:
        create_actor = partial(ScoringActor, with_absolute_paths(images), evaluate, digests=settings.extractor_digests)
        compute_shards(context, "reference", shards, create_actor, evaluate)
        reference = compute_reference(settings, training, shards)
        save_reference(reference, out)
    storage.remove_folder(config.output)  # not earlier: the lease would be written into it again
    return reference


def work_folder(config: Recipe, out: str) -> str:
    """Return the folder next to `out` for the shards of a reference, named after the digest of its inputs."""
    images = RealImages.of(ScoringSettings.from_recipe(config))
    column = images.training.column_identity.values()
    identity = digest_of([images.digest(images.training), config.evaluate.shard_rows, *column])
    return temporary_shard_dir(out, identity)
