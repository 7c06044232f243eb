"""Publish an evaluation as a card, and prepare its verification: the same protocols, in a folder of its own."""

import copy
import shlex
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from cluster import storage
from cluster.credentials import refuse_credentials
from dit.formats.record import model_label
from dit.model import meta_state
from evaluation.card import CARD_FILE, CheckpointFacts, EvaluationCard, LatentsFacts
from evaluation.metric_names import parse_metric_name
from evaluation.pages.card_text import render_card
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import IN_TRACKING, LocatedCheckpoint, find_recorded, open_checkpoint
from pipelines.config.evaluate import FurtherMetric
from pipelines.config.reader import apply_override, resolved, validate_recipe
from pipelines.config.recipe import Recipe
from pipelines.images.open import with_absolute_paths
from pipelines.latents.dataset import LatentDataset
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol, evaluation_protocols
from pipelines.scoring.protocols.given_recipe import load_given_recipe
from pipelines.scoring.protocols.protocol_file import require_protocols, with_protocols
from pipelines.scoring.settings import ScoringSettings, absolute_paths
from pipelines.tracking import tags
from pipelines.tracking.provenance import RECIPE_FILE, environment_tags, toml_of
from raydit.errors import InvalidInput, NotFound

CARD_PAGE = "card.md"


def make_card(
    report: EvaluationReport, *, recipe: str | None = None, overrides: tuple[str, ...] = (), model: str | None = None
) -> EvaluationCard:
    """Make the card of an evaluation.

    recipe, overrides: what the evaluation was called with, if its checkpoint's recipe does not say it; what the report
    and its protocols say need not be repeated. model: published size of official weights. Raises InvalidInput if the
    report is of no checkpoint, if its checkpoint or the recipe is not the one that was scored, or for credentials.
    """
    if report.protocol.is_of_given_images:
        raise InvalidInput(
            f"{report.checkpoint}: found a report of given images",
            "one of a checkpoint, which can be sampled from again",
            "evaluate a checkpoint",
        )
    opened = open_scored(report.checkpoint, report.checkpoint_digest, report.protocol.weights, model, overrides)
    given = load_given_recipe(recipe, overrides)(opened) if recipe else checkpoint_recipe(opened, overrides)
    config = _with_reported(with_protocols(given, report.protocols), report)
    do = "give what it was evaluated with by --recipe and --set"
    require_protocols(_protocols(config, opened), report.protocols, "the report", do)
    card = EvaluationCard(
        report=replace(report, artifacts={}),
        checkpoint=_checkpoint_facts(opened, report.protocol.weights, model),
        latents=_latents_facts(opened, config),
        recipe=resolved(_with_absolute_paths(config)),
        environment={name.removeprefix(tags.VERSION_PREFIX): value for name, value in environment_tags().items()},
        command=_command(opened, config, report, model),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    refuse_credentials(asdict(card))
    return card


def _with_reported(config: Recipe, report: EvaluationReport) -> Recipe:
    """Return a recipe that asks for what a report has beside what follows from its protocols, and for no more."""
    reported = {parse_metric_name(name).kind.name for name in (*report.metrics, *report.missing)}
    reconstructions = config.evaluate.reconstructions
    evaluate = replace(
        config.evaluate,
        metrics=tuple(kind for kind in get_args(FurtherMetric) if kind in reported),
        per_class=any(part.per_class for part in report.parts) or None,
        reconstructions=(reconstructions or None) if report.reconstructions else False,
    )
    return replace(config, evaluate=evaluate)


def _with_absolute_paths(config: Recipe) -> Recipe:
    """Return a recipe that means the same in any working directory, and a data set of a hub by its present commit."""
    evaluate = replace(
        config.evaluate,
        reference=absolute_paths(config.evaluate.reference),
        extractor_weights=absolute_paths(config.evaluate.extractor_weights),
        autoguidance=absolute_paths(config.evaluate.autoguidance),
    )
    images = with_absolute_paths(config.images) if config.images.path else config.images
    return replace(config, output=storage.absolute(config.output), images=images, evaluate=evaluate)


def write_card(card: EvaluationCard, folder: str) -> dict[str, str]:
    """Write a card's recipe, its page and its file, each atomically; return their paths or URIs by name."""
    contents = {
        "recipe": (RECIPE_FILE, toml_of(card.recipe)),
        "page": (CARD_PAGE, render_card(card)),
        "card": (CARD_FILE, card.to_json()),
    }
    storage.refuse_job_folder(folder)
    paths = {name: storage.join(folder, file) for name, (file, _) in contents.items()}
    for name, (_, text) in contents.items():
        storage.write_atomically(paths[name], text.encode())
    return paths


def read_card(name: str) -> EvaluationCard:
    """Read a card by the path or URI of its file, of its page beside it, or of their folder. Raises NotFound."""
    folder, last = storage.split(name)
    folder = (folder or ".") if last == CARD_PAGE else name
    file = name if last.endswith(".json") else storage.join(folder, CARD_FILE)
    if not storage.exists(file):
        raise NotFound(f"no card at {file}", f"a {CARD_FILE}", "write one: raydit publish REPORT")
    return EvaluationCard.from_json(storage.read_bytes(file), file)


def plan_verification(
    card: EvaluationCard,
    folder: str,
    *,
    checkpoint: str | None = None,
    model: str | None = None,
    overrides: tuple[str, ...] = (),
) -> tuple[LocatedCheckpoint, Recipe]:
    """Return the checkpoint of a card, and the recipe that scores it by the card's protocols in a folder of its own.

    checkpoint: where it lies now, if not where the card says. overrides: of the recipe, such as paths and workers on
    this machine. Raises InvalidInput if it is another checkpoint, or if another reference, decoder, extractor or
    setting would be used than the card states; NotFound if something is missing.
    """
    recorded = validate_recipe(copy.deepcopy(card.recipe))
    if storage.absolute(folder) == storage.absolute(recorded.output):
        raise InvalidInput(
            f"--out: found {folder}, the output that the card was made in",
            "a folder of its own, because a report that is there already would be taken for a new one",
            "name another folder",
        )
    size = model or card.checkpoint.published_size or None
    opened = open_scored(
        checkpoint or card.checkpoint.uri, card.checkpoint.digest, card.report.protocol.weights, size, overrides
    )
    content: dict[str, Any] = copy.deepcopy(card.recipe) | {"output": storage.absolute(folder), "tracking": {}}
    # The images are listed as they were when the latents were made, which may record how.
    content["encode"] = {**content.get("encode", {}), "output": recorded.latents}
    if storage.is_local(folder):
        content["tracking"] = {"uri": f"sqlite:///{Path(storage.local_path(folder)).absolute() / 'mlflow.db'}"}
    for override in overrides:
        apply_override(content, override)
    config = validate_recipe(content)
    do = "name the same images, reference and weights by --set, or restore them"
    require_protocols(_protocols(config, opened), card.report.protocols, "the card", do)
    return opened, config


def _protocols(config: Recipe, opened: LocatedCheckpoint) -> list[EvaluationProtocol]:
    settings = ScoringSettings.from_recipe(config)
    return evaluation_protocols(settings, evaluation_protocol(settings, opened))


def open_scored(
    name: str, digest: str, weights: str, model: str | None = None, overrides: tuple[str, ...] = ()
) -> LocatedCheckpoint:
    """Open the checkpoint that was scored.

    weights: those that were sampled with. Raises InvalidInput if another checkpoint is there, or if the weights have
    changed since they were written, and NotFound if none is.
    """
    found = name if name.startswith(IN_TRACKING) else find_recorded(name, digest)
    opened = open_checkpoint(found, model=model, overrides=overrides)
    if opened.digest != digest:
        raise InvalidInput(
            f"{opened.origin}: found a checkpoint of digest {opened.digest[:12]}",
            f"{digest[:12]}, the one that was scored",
            "name the folder where it lies now, or restore it",
        )
    opened.require_intact(weights)
    return opened


def _checkpoint_facts(opened: LocatedCheckpoint, weights: str, model: str | None) -> CheckpointFacts:
    record = opened.record
    return CheckpointFacts(
        uri=opened.origin,
        digest=opened.digest,
        step=opened.step,
        model=f"{model_label(record.model, record.recipe)}, {record.process_kind}",
        parameters=sum(tensor.numel() for tensor in meta_state(record.model_config).values()),
        bytes=sum((opened.path / name).stat().st_size for name in opened.weights_files(weights)),
        files=dict(opened.files),
        raydit_version=record.raydit_version,
        source=asdict(record.source) if record.source else None,
        published_size=model or "",
    )


def _latents_facts(opened: LocatedCheckpoint, config: Recipe) -> LatentsFacts | None:
    fingerprint = opened.record.latents_fingerprint
    if fingerprint is None:
        return None
    facts = LatentsFacts(fingerprint=fingerprint, path=config.latents)
    try:
        dataset = LatentDataset.open(config.latents)
    except (NotFound, InvalidInput):
        return facts
    if dataset.fingerprint != fingerprint:
        return facts
    autoencoder = dataset.autoencoder
    described = f"{autoencoder['id']} ({autoencoder['class']}, {autoencoder['sha256'][:12]})"
    return replace(facts, images=len(dataset), quarantined=dataset.num_quarantined, autoencoder=described)


def _command(opened: LocatedCheckpoint, config: Recipe, report: EvaluationReport, model: str | None) -> str:
    words = ["raydit", "evaluate", opened.origin, "--recipe", RECIPE_FILE]
    words += ["--model", model] if model else []
    seeds = max(map(len, report.repeats.values()), default=1)
    words += ["--repeats", str(seeds)] if seeds > 1 else []
    if config.random is not None:  # a recipe that is given leaves the checkpoint's own, unless it is named
        words += ["--set", f"random={config.random}"]
    return shlex.join(words)
