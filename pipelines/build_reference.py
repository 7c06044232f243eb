"""The build-reference job: statistics of real images in a file of their own."""

from cluster import storage
from evaluation.extractors import weights_path
from evaluation.reference import ReferenceStatistics
from pipelines.artifacts import digest_of
from pipelines.config.recipe import Recipe
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.actors import compute_features, listing_parts, make_shards, temporary_shard_dir
from pipelines.scoring.references import RealImages, reference_statistics, save_reference
from pipelines.stage import StageContext


def build_reference(config: Recipe, out: str, *, address: str | None = None) -> ReferenceStatistics:
    """Statistics of all of a recipe's images in a file of their own, at a path or URI. address: of Ray.

    The recipe's output is the folder of the work (see work_folder): what is finished of it is kept when the command is
    cut off, and all of it removed at the end. Raises FileExistsError if `out` is there.
    """
    storage.refuse_existing(out)
    images = RealImages.of(config)
    weights_path(config.evaluate.extractor, config.evaluate.extractor_weights)
    shards = make_shards(storage.absolute(config.output), listing_parts(images.training, config.evaluate.shard_rows))
    with StageContext(config, address=address) as context:
        arguments = (with_absolute_paths(config.images), config.evaluate)
        compute_features(context, "reference", shards, arguments, config.evaluate)
        reference = reference_statistics(config, images.training, shards)
        save_reference(reference, out)
    storage.remove_folder(config.output)  # not earlier: the lease would be written into it once more
    return reference


def work_folder(config: Recipe, out: str) -> str:
    """Where the shards of a reference lie until it is whole: beside it, named after what it is made from."""
    images = RealImages.of(config)
    identity = digest_of([images.digest(images.training), config.evaluate.shard_rows])
    return temporary_shard_dir(out, identity)
