"""From pixels to the registry: what an artifact was made from and what was made of it, and whether all is still there.

images -> autoencoder -> latents -> checkpoint -> evaluations -> registered versions. What every artifact recorded of
the one before it is compared with what lies on storage now.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster import storage
from dit.checkpoint import COMPLETE
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import IN_TRACKING, LocatedCheckpoint, open_checkpoint
from pipelines.checkpoints.stored import describe_step, finished_steps
from pipelines.config.reader import validate_recipe
from pipelines.config.recipe import Recipe
from pipelines.images.open import open_source
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.dataset import MANIFEST, LatentDataset, fingerprint_of
from pipelines.latents.verify import description_of
from pipelines.registry.queries import find_run
from pipelines.scoring.protocols import checkpoint_recipe
from pipelines.scoring.references import reference_digest
from pipelines.scoring.reports import read_report, report_files
from pipelines.tracking.lookup import CHECKPOINT, DIGEST, REMOVED, connected_client, find_checkpoint, has_files
from pipelines.tracking.store import tracking_uri


@dataclass
class Link:
    """One artifact of the chain."""

    kind: str
    """images, autoencoder, latents, checkpoint, evaluation, model or version."""
    name: str
    digest: str = ""
    """What is recorded of it by what was made from it, else by itself."""
    facts: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What no longer matches."""
    unknown: list[str] = field(default_factory=list)
    """What could not be compared, and why."""

    def compare(self, what: str, found: str, expected: str | None) -> None:
        """Take note if a digest is not the one that was recorded; None: none was."""
        if expected is None:
            self.unknown.append(f"{what}: nothing was recorded to compare with")
        elif found != expected:
            self.broken.append(f"{what}: found {found[:12]}, expected {expected[:12]}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lineage(target: str, *, store: str = "", quick: bool = False) -> list[Link]:
    """The chain through a latent data set, a checkpoint, an MLflow run or an MLflow model, in the order of making.

    target: a folder or URI of latents, any name of a checkpoint (see pipelines.checkpoints.open), id or name of a run.
    store: MLflow's; left out, that of the artifact's recipe. quick: compare sizes and recorded digests, read no shard
    and no weights. Raises FileNotFoundError or ValueError if the target is nothing of these.
    """
    place, expected = _resolved(target, store)
    if storage.exists(storage.join(place, MANIFEST)):
        return _around_latents(LatentDataset.open(place), expected, store, quick)
    try:
        opened = open_checkpoint(place)
    except FileNotFoundError as error:
        if expected is None:
            raise
        gone = Link("checkpoint", place, expected, broken=[f"MLflow was told of it, and it is gone: {error}"])
        return [gone, *_in_mlflow(expected, tracking_uri(store))]
    return _around_checkpoint(opened, expected, store, quick)


def _resolved(target: str, store: str) -> tuple[str, str | None]:
    """Where the artifact lies, and the digest that MLflow was told, if it was named through MLflow."""
    if target.startswith(IN_TRACKING):
        return find_checkpoint(store, target)
    if storage.exists(target):
        return storage.absolute(target), None
    uri = tracking_uri(store)
    with connected_client(uri) as client:
        run = find_run(client, uri, target)
    tags = run.data.tags
    if "raydit.latents" in tags:
        return tags["raydit.latents"], tags["raydit.latents_fingerprint"]
    if CHECKPOINT in tags:
        return tags[CHECKPOINT], tags.get(DIGEST)
    return find_checkpoint(store, f"runs:/{run.info.run_id}")


def _around_checkpoint(opened: LocatedCheckpoint, expected: str | None, store: str, quick: bool) -> list[Link]:
    config = checkpoint_recipe(opened)
    chain = []
    if opened.config["recipe"] is None:
        unknown = "the checkpoint is imported: of images and latents nothing is recorded"
        chain.append(Link("latents", "unknown", unknown=[unknown]))
    else:
        chain += _latents_and_before(config.latents, opened.config["latents_fingerprint"], config, quick)
    if not any(link.kind == "autoencoder" for link in chain):
        chain.append(_autoencoder(opened.config["autoencoder"], opened.output))
    chain += _checkpoint(opened.origin, opened.config, opened.digest, expected, quick)
    chain += _evaluations(opened, config, chain)
    return [*chain, *_in_mlflow(opened.digest, tracking_uri(store or config.tracking.uri))]


def _around_latents(dataset: LatentDataset, expected: str | None, store: str, quick: bool) -> list[Link]:
    config = validate_recipe(dataset.manifest["recipe"]) if dataset.manifest["recipe"] else None
    chain = _latents_and_before(dataset.path, expected or dataset.fingerprint, config, quick)
    folder = storage.join(storage.split(dataset.path)[0], "checkpoints")
    for step in finished_steps(folder):
        checkpoint = describe_step(folder, step)
        trained_on = checkpoint.config["latents_fingerprint"]
        chain += _checkpoint(checkpoint.location, checkpoint.config, checkpoint.digest, None, quick=True)
        chain[-1].compare("latents that it was trained on", dataset.fingerprint, trained_on)
        chain += _in_mlflow(checkpoint.digest, tracking_uri(store or (config.tracking.uri if config else "")))
    return chain


def _latents_and_before(path: str, recorded: str | None, config: Recipe | None, quick: bool) -> list[Link]:
    """Images, autoencoder and latents; recorded: the fingerprint that a checkpoint, or MLflow, knows."""
    link = Link("latents", path, recorded or "")
    try:
        dataset = LatentDataset.open(path)
    except (FileNotFoundError, ValueError) as error:
        link.broken.append(str(error))
        return [link]
    manifest = dataset.manifest
    link.facts.append(f"{len(dataset):,} rows in {len(manifest['shards'])} shards, revision {dataset.revision}")
    link.compare("fingerprint", dataset.fingerprint, recorded)
    content = fingerprint_of(description_of(manifest), manifest["shards"])
    link.compare(f"fingerprint of what {MANIFEST} describes", content, dataset.fingerprint)
    files = {shard["file"]: (shard["bytes"], shard["sha256"]) for shard in manifest["shards"]}
    link.broken += _changed(path, files, quick)
    return [_images(manifest, config), _autoencoder(manifest["autoencoder"], storage.split(path)[0]), link]


def _images(manifest: dict, config: Recipe | None) -> Link:
    recorded = manifest["identity"].get("images", {}).get("digest", "")
    if config is None:
        return Link("images", "unknown", recorded, unknown=["the latents record no recipe to find the images by"])
    link = Link("images", config.images.path, recorded)
    try:
        listing, _ = open_source(config.images).listing().split(config.images.held_out)
    except (OSError, ValueError) as error:
        link.unknown.append(f"not at hand: {error}")
    else:
        link.facts.append(f"{len(listing):,} images to train on")
        link.compare("listing", listing.digest, recorded or None)
    return link


def _autoencoder(recorded: dict, output: str) -> Link:
    link = Link("autoencoder", recorded["id"], recorded["sha256"] or "")
    try:
        found = AutoencoderHandle(recorded["id"], output).describe(download=False)
    except (OSError, ValueError) as error:
        link.unknown.append(f"not at hand: {error}")
    else:
        link.compare("weights", found["sha256"], recorded["sha256"])
    return link


def _checkpoint(place: str, config: dict, digest: str, expected: str | None, quick: bool) -> Iterator[Link]:
    link = Link("checkpoint", place, expected or digest, [f"step {config['step']:,}"])
    if expected:
        link.compare("digest", digest, expected)
    digests = storage.read_json(storage.join(place, COMPLETE))
    link.broken += _changed(place, {name: (None, sha256) for name, sha256 in digests.items()}, quick)
    yield link


def _changed(folder: str, files: dict[str, tuple[int | None, str]], quick: bool) -> Iterator[str]:
    """What is wrong with the files in a folder; by name their sizes, where recorded, and digests."""
    for name, (size, sha256) in files.items():
        place = storage.join(folder, name)
        try:
            found = storage.file_size(place)
            if size is not None and found != size:
                yield f"{name}: found {found:,} bytes, expected {size:,}"
            elif not quick and (digest := storage.sha256_file(place)) != sha256:
                yield f"{name}: found sha256 {digest[:12]}, expected {sha256[:12]}"
        except FileNotFoundError:
            yield f"{name} is not there"


def _evaluations(opened: LocatedCheckpoint, config: Recipe, chain: list[Link]) -> Iterator[Link]:
    """Reports of the place that the checkpoint lies in."""
    for file in report_files(storage.join(opened.output, "evaluations"), None, opened.name):
        link = Link("evaluation", file)
        yield link
        try:
            report = read_report(file)
        except ValueError as error:
            link.broken.append(str(error))
            continue
        value, deviation = report.estimate(report.headline)
        score = f"{report.headline} {value:.5g}" + (f" +- {deviation:.2g}" if deviation else "")
        link.digest = report.protocol_id
        link.facts.append(f"{score}, protocol {report.protocol_id}, reference {report.protocol.reference_digest[:12]}")
        link.compare("checkpoint that it is of", opened.digest, report.checkpoint_digest)
        _compare_reference(link, report, config, chain)


def _compare_reference(link: Link, report: EvaluationReport, config: Recipe, chain: list[Link]) -> None:
    try:
        found = reference_digest(config)
    except (OSError, ValueError) as error:
        link.unknown.append(f"reference: not at hand: {error}")
        return
    if found == report.protocol.reference_digest:
        return
    if any(other.kind == "images" and other.broken for other in chain):
        link.compare("reference", found, report.protocol.reference_digest)
    else:
        link.unknown.append("reference: not the training images', so another file or extractor was given")


def _in_mlflow(digest: str, uri: str) -> list[Link]:
    """The models and registered versions of a checkpoint."""
    try:
        with connected_client(uri) as client:
            return [*_models(client, digest), *_versions(client, digest)]
    except (FileNotFoundError, ConnectionError) as error:
        return [Link("model", "unknown", digest, unknown=[str(error)])]


def _models(client, digest: str) -> Iterator[Link]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for model in client.search_logged_models(experiments, filter_string=f"tags.`{DIGEST}` = '{digest}'"):
        facts = [f"{model.name}, run {model.source_run_id}"]
        link = Link("model", f"models:/{model.model_id}", digest, facts)
        if REMOVED in model.tags:
            link.facts.append("the training has removed its checkpoint")
        yield link


def _versions(client, digest: str) -> Iterator[Link]:
    for version in client.search_model_versions(f"tags.`raydit.digest` = '{digest}'"):
        aliases = client.get_registered_model(version.name).aliases
        held = [alias for alias, number in aliases.items() if str(number) == str(version.version)]
        facts = [f"{version.tags['raydit.metric']} {float(version.tags['raydit.value']):.5g}"]
        facts += [f"alias {alias}" for alias in sorted(held)]
        link = Link("version", f"models:/{version.name}/{version.version}", digest, facts)
        if not has_files(client, version):
            link.broken.append("its files are gone from the store: it cannot be loaded. Promote its checkpoint again")
        yield link
