"""Lineage from pixels to the registry: the inputs and the results of an artifact, and whether they still match.

images -> autoencoder -> latents -> checkpoint -> evaluations -> registered versions. What each artifact recorded about
its inputs is compared with what lies on storage now.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster import storage
from dit.formats.completion import COMPLETE
from dit.formats.digests import parse_digests
from dit.formats.record import CheckpointRecord
from evaluation.report import EvaluationReport
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import IN_TRACKING, LocatedCheckpoint, find_recorded, open_checkpoint, reopen
from pipelines.config.reader import validate_recipe
from pipelines.config.recipe import Recipe
from pipelines.images.held_out import split_images
from pipelines.latents.autoencoder import AutoencoderHandle, is_autoencoder_of
from pipelines.latents.dataset import MANIFEST, LatentDataset, fingerprint_of
from pipelines.latents.held_out import is_held_out
from pipelines.latents.recorded_images import list_recorded_images
from pipelines.registry.queries import source_commits
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.scoring.real_images.references import reference_digest
from pipelines.scoring.reports.report_files import find_report_files, read_report
from pipelines.scoring.settings import EVALUATIONS, ScoringSettings
from pipelines.tracking import tags
from pipelines.tracking.lookup import CheckpointRef, connected_client, find_checkpoint, find_run, has_files
from pipelines.tracking.searches import experiment_ids
from pipelines.tracking.store import tracking_uri
from raydit.errors import NotFound, StorageFailed, Unreachable


@dataclass
class Link:
    """One artifact of the chain, and the result of comparing it with its record."""

    kind: str
    """images, autoencoder, latents, start, part, base, checkpoint, evaluation, model or version."""
    name: str
    digest: str = ""
    """The digest that its results recorded, or else its own."""
    facts: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Mismatches between records and storage."""
    unknown: list[str] = field(default_factory=list)
    """Comparisons that were not possible, and why."""

    def compare(self, subject: str, found: str, expected: str | None) -> None:
        """Add a mismatch if a digest is not the recorded one. expected: None if none was recorded."""
        if expected is None:
            self.unknown.append(f"{subject}: no digest was recorded to compare with")
        elif found != expected:
            self.broken.append(f"{subject}: found {found[:12]}, expected {expected[:12]}")

    def to_dict(self) -> dict[str, Any]:
        """Return the link as JSON values."""
        return asdict(self)


def lineage(target: str, *, store: str = "", quick: bool = False) -> list[Link]:
    """Return the chain through a latent data set, a checkpoint, an MLflow run or model, from the images on.

    target: a folder or URI of latents, any name of a checkpoint (see pipelines.checkpoints.open), id or name of a run.
    store: MLflow's URI; empty: that of the artifact's recipe. quick: compare sizes and recorded digests only, without
    reading shards or weights. Raises NotFound or InvalidInput if the target is none of these.
    """
    location, expected = _resolved(target, store)
    if storage.exists(storage.join(location, MANIFEST)):
        return _around_latents(LatentDataset.open(location), expected, store, quick)
    try:
        opened = open_checkpoint(location)
    except FileNotFoundError as error:
        if expected is None:
            raise
        gone = Link("checkpoint", location, expected, broken=[f"MLflow has recorded it, and it is gone: {error}"])
        return [gone, *_in_mlflow(expected, tracking_uri(store))]
    return _around_checkpoint(opened, expected, store, quick)


def _resolved(target: str, store: str) -> tuple[str, str | None]:
    """Return the location of the artifact, and the digest that MLflow recorded if it was named through MLflow."""
    if target.startswith(IN_TRACKING):
        return _located(find_checkpoint(store, target))
    if storage.exists(target):
        return storage.absolute(target), None
    uri = tracking_uri(store)
    with connected_client(uri) as client:
        run = find_run(client, uri, target)
    known = run.data.tags
    if tags.LATENTS in known:
        return known[tags.LATENTS], known[tags.LATENTS_FINGERPRINT]
    if tags.CHECKPOINT in known:
        return _located(CheckpointRef(known[tags.CHECKPOINT], known.get(tags.CHECKPOINT_DIGEST), ""))
    return _located(find_checkpoint(store, f"runs:/{run.info.run_id}"))


def _located(reference: CheckpointRef) -> tuple[str, str | None]:
    """Return where a checkpoint that MLflow recorded lies now, and the digest that it must have."""
    return find_recorded(reference.location, reference.digest), reference.digest


def _around_checkpoint(opened: LocatedCheckpoint, expected: str | None, store: str, quick: bool) -> list[Link]:
    config = checkpoint_recipe(opened)
    chain = []
    if opened.record.recipe is None:
        chain.append(_unknown_latents(opened.record))
    else:
        chain += _latents_and_before(config.latents, opened.record.latents_fingerprint, config, quick)
    if not any(link.kind == "autoencoder" for link in chain):
        chain.append(_autoencoder(opened.config["autoencoder"], opened.output))
    chain += _made_from(opened)
    chain += _checkpoint(opened.origin, opened.config, opened.digest, expected, quick)
    chain += _evaluations(opened, config, chain)
    return [*chain, *_in_mlflow(opened.digest, tracking_uri(store or config.tracking.uri))]


def _around_latents(dataset: LatentDataset, expected: str | None, store: str, quick: bool) -> list[Link]:
    config = validate_recipe(dataset.recipe, stage="encode") if dataset.recipe else None
    chain = _latents_and_before(dataset.path, expected or dataset.fingerprint, config, quick)
    if is_held_out(dataset):
        return chain  # no checkpoint was trained on it
    checkpoints = CheckpointFolder(storage.join(storage.split(dataset.path)[0], "checkpoints"))
    for step in checkpoints.finished_steps():
        checkpoint = checkpoints.describe(step)
        trained_on = checkpoint.record.latents_fingerprint
        chain += _checkpoint(checkpoint.origin, checkpoint.config, checkpoint.digest, None, quick=True)
        chain[-1].compare("latents it was trained on", dataset.fingerprint, trained_on)
        chain += _in_mlflow(checkpoint.digest, tracking_uri(store or (config.tracking.uri if config else "")))
    return chain


def _latents_and_before(path: str, recorded: str | None, config: Recipe | None, quick: bool) -> list[Link]:
    """Return the links of images, autoencoder and latents.

    recorded: the fingerprint that a checkpoint or MLflow recorded.
    """
    link = Link("latents", path, recorded or "")
    try:
        dataset = LatentDataset.open(path)
    except (FileNotFoundError, ValueError) as error:
        link.broken.append(str(error))
        return [link]
    link.facts.append(f"{len(dataset):,} rows in {len(dataset.shards)} shards, revision {dataset.revision}")
    if not dataset.stores_moments:
        link.facts.append("without moments: training encodes the images")
    link.compare("fingerprint", dataset.fingerprint, recorded)
    content = fingerprint_of(dataset.description, dataset.shards)
    link.compare(f"fingerprint of the content of {MANIFEST}", content, dataset.fingerprint)
    files: dict[str, tuple[int | None, str]] = {shard.file: (shard.bytes, shard.sha256) for shard in dataset.shards}
    link.broken += _mismatches(path, files, quick)
    return [_images(dataset, config), _autoencoder(dataset.autoencoder, storage.split(path)[0]), link]


def _images(dataset: LatentDataset, config: Recipe | None) -> Link:
    recorded = dataset.identity.get("images", {}).get("digest", "")
    if config is None:
        return Link(
            "images", "unknown", recorded, unknown=["the latents record no recipe, which would name the images"]
        )
    link = Link("images", config.images.path, recorded)
    try:
        latents = config.latents if is_held_out(dataset) else str(dataset.path)
        source, images = list_recorded_images(config.images, latents, config.output)
        training, held_out = split_images(source, images)
    except (OSError, ValueError) as error:
        link.unknown.append(f"not available: {error}")
    else:
        listing, use = (held_out, "held out") if is_held_out(dataset) else (training, "to train on")
        link.facts.append(f"{len(listing):,} images {use}")
        link.compare("listing", listing.digest, recorded or None)
    return link


def _autoencoder(recorded: dict, output: str) -> Link:
    link = Link("autoencoder", recorded["id"], recorded["sha256"] or "")
    try:
        handle = AutoencoderHandle(recorded["id"], output)
        found, folder = handle.describe(download=False)["sha256"], handle.folder(download=False)
    except (OSError, ValueError) as error:
        link.unknown.append(f"not available: {error}")
    else:
        same = recorded["sha256"] is not None and is_autoencoder_of(recorded, folder)
        link.compare("weights", recorded["sha256"] if same else found, recorded["sha256"])
    return link


def _unknown_latents(record: CheckpointRecord) -> Link:
    """Return the latents of a checkpoint without a recipe: a merged one has the fingerprint that its parts recorded."""
    made = "merged" if record.source is not None and record.source.format == "merge" else "imported"
    known = "only the fingerprint of its latents is" if record.latents_fingerprint else "no images or latents are"
    unknown = f"the checkpoint is {made}: {known} recorded"
    return Link("latents", "unknown", record.latents_fingerprint or "", unknown=[unknown])


def _made_from(made: LocatedCheckpoint) -> list[Link]:
    """Return the checkpoints whose weights a checkpoint was made from, the first one first.

    Those that its training started from, more than one if it continued with new data; those that were merged into it;
    the base of an adapter that was not trained here.
    """
    links: list[Link] = []
    record, base, start = made.record, made.base, made.record.start
    while start is not None:
        facts = [f"step {start['step']:,}, {start['weights']!r} weights"]
        link = Link("start", start["checkpoint"], start["sha256"], facts)
        if opened := _reopened(link, start["digest"], start.get("imported")):
            link.compare("weights", opened.weights_sha256(start["weights"]), start["sha256"])
        links.insert(0, link)
        start = start.get("earlier")
    for part in (record.source and record.source.parts) or ():
        link = Link("part", part["checkpoint"], part["digest"], [f"merged, times {part['share']:g}"])
        if opened := _reopened(link, part["digest"], None):
            link.compare("digest", opened.digest, part["digest"])
        links.append(link)
    if base is not None and record.start is None:
        link = Link("base", base.uri, base.sha256, [base.file])
        if opened := _reopened(link, base.digest, base.imported):
            link.compare("weights", opened.files.get(base.file, "none"), base.sha256)
        links.append(link)
    return links


def _reopened(link: Link, digest: str, imported: Mapping[str, Any] | None) -> LocatedCheckpoint | None:
    """Open the checkpoint that a link names; say in the link why not if that fails, and return None."""
    try:
        return reopen(link.name, digest, imported)
    except (OSError, ValueError) as error:
        link.unknown.append(f"not available: {error}")
        return None


def _checkpoint(location: str, config: dict, digest: str, expected: str | None, quick: bool) -> Iterator[Link]:
    link = Link("checkpoint", location, expected or digest, [f"step {config['step']:,}"])
    if expected:
        link.compare("digest", digest, expected)
    complete = storage.join(location, COMPLETE)
    digests = parse_digests(storage.read_bytes(complete), complete)
    link.broken += _mismatches(location, {name: (None, sha256) for name, sha256 in digests.items()}, quick)
    yield link


def _mismatches(folder: str, files: dict[str, tuple[int | None, str]], quick: bool) -> Iterator[str]:
    """Yield what is wrong with the files in a folder.

    files: recorded sizes (None if unknown) and sha256 digests by name.
    """
    for name, (size, sha256) in files.items():
        path = storage.join(folder, name)
        try:
            found = storage.file_size(path)
            if size is not None and found != size:
                yield f"{name}: found {found:,} bytes, expected {size:,}"
            elif not quick and (digest := storage.sha256_file(path)) != sha256:
                yield f"{name}: found sha256 {digest[:12]}, expected {sha256[:12]}"
        except FileNotFoundError:
            yield f"{name} is missing"


def _evaluations(opened: LocatedCheckpoint, config: Recipe, chain: list[Link]) -> Iterator[Link]:
    """Yield the evaluations in the output of the checkpoint."""
    for file in find_report_files(storage.join(opened.output, EVALUATIONS), None, opened.name):
        link = Link("evaluation", file)
        yield link
        try:
            report = read_report(file)
        except ValueError as error:
            link.broken.append(str(error))
            continue
        value, error_bar = report.estimate(report.headline)
        score = f"{report.headline} {value:.5g}" + (f" +- {error_bar:.2g}" if error_bar else "")
        link.digest = report.protocol_id
        link.facts.append(
            f"{score}, protocol {report.protocol.label}, reference {report.protocol.reference_digest[:12]}"
        )
        link.facts += [f"also scored by protocol {each.label}" for each in report.protocols[1:]]
        link.facts += [f"scored by commit {report.commit}"] if report.commit else []
        link.compare("checkpoint", opened.digest, report.checkpoint_digest)
        _compare_reference(link, report, config, chain)


def _compare_reference(link: Link, report: EvaluationReport, config: Recipe, chain: list[Link]) -> None:
    try:
        found = reference_digest(ScoringSettings.from_recipe(config))
    except (OSError, ValueError) as error:
        link.unknown.append(f"reference: not available: {error}")
        return
    if found == report.protocol.reference_digest:
        return
    if any(other.kind == "images" and other.broken for other in chain):
        link.compare("reference", found, report.protocol.reference_digest)
    else:
        link.unknown.append("reference: not that of the training images, so another file or extractor was given")


def _in_mlflow(digest: str, uri: str) -> list[Link]:
    """Return the LoggedModels and registered versions of a checkpoint."""
    try:
        with connected_client(uri) as client:
            return [*_models(client, digest), *_versions(client, digest)]
    except (NotFound, Unreachable, StorageFailed) as error:
        return [Link("model", "unknown", digest, unknown=[str(error)])]


def _models(client: Any, digest: str) -> Iterator[Link]:
    for model in client.search_logged_models(
        experiment_ids(client), filter_string=tags.has(tags.CHECKPOINT_DIGEST, digest)
    ):
        facts = [f"{model.name}, run {model.source_run_id}"]
        if commit := source_commits(client, [model])[model.source_run_id]:
            facts.append(f"commit {commit}")
        link = Link("model", f"models:/{model.model_id}", digest, facts)
        if tags.REMOVED in model.tags:
            link.facts.append("the training has removed its checkpoint")
        yield link


def _versions(client: Any, digest: str) -> Iterator[Link]:
    for version in client.search_model_versions(tags.has(tags.VERSION_DIGEST, digest)):
        aliases = client.get_registered_model(version.name).aliases
        held = [alias for alias, number in aliases.items() if str(number) == str(version.version)]
        facts = [f"{version.tags[tags.VERSION_METRIC]} {float(version.tags[tags.VERSION_VALUE]):.5g}"]
        facts += [f"alias {alias}" for alias in sorted(held)]
        link = Link("version", f"models:/{version.name}/{version.version}", digest, facts)
        if not has_files(client, version):
            link.broken.append(
                "its files are missing from the store, so it cannot be loaded. Promote its checkpoint again"
            )
        yield link
