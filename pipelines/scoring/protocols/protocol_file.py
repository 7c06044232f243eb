"""Protocols in files: what `raydit tune` chose, or what a report was made by, as the settings of an evaluation.

A protocol file is JSON: {"format": "raydit.protocol", "version": 1, "protocol_id", "protocol", "further": [protocol]},
where `further` holds the protocols of further extractors. A report.json serves as well.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from cluster import storage
from evaluation.protocol import UINT8_RULE, EvaluationProtocol, implied_values
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.overrides import read_overrides
from pipelines.config.recipe import Recipe
from pipelines.scoring.checks import check_sampling_steps
from pipelines.scoring.protocols.build_protocol import (
    check_sample_size,
    decoder_digest,
    evaluation_protocol,
    evaluation_protocols,
    scoring_fields,
)
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput, NotFound

FORMAT, VERSION = "raydit.protocol", 1
_OF_EVALUATE = (
    *("num_samples", "labels", "sampler", "sampling_steps", "time_shift", "sde_diffusion", "sde_norm", "cfg_scale"),
    *("cfg_channels", "cfg_interval", "autoguidance_weights", "weights", "dtype", "decoder_dtype"),
)
"""Fields that the protocol and [evaluate] have in common."""


def protocol_file(protocols: Sequence[EvaluationProtocol]) -> bytes:
    """Return the content of a protocol file. protocols: of each extractor, the first one's first."""
    first, *further = protocols
    content = {
        "format": FORMAT,
        "version": VERSION,
        "protocol_id": first.protocol_id,
        "protocol": first.to_dict(),
        **({"further": [each.to_dict() for each in further]} if further else {}),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def read_protocols(file: str) -> list[EvaluationProtocol]:
    """Read the protocols of a protocol file or a report, by path or URI. Raises NotFound and InvalidInput."""
    if not storage.exists(file):
        raise NotFound(f"no protocol at {file}", "a protocol file, or a report.json", "correct the path")
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(file))
        further = [each.get("protocol", each) for each in content.get("further", [])]  # a report's have scores as well
        protocols = [EvaluationProtocol.from_dict(each) for each in (content["protocol"], *further)]
        recorded = content["protocol_id"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{file}: found no protocol ({type(error).__name__}: {str(error)[:200]})",
            "a file that `raydit tune` wrote, or a report.json",
            "name one of these",
        ) from error
    if protocols[0].protocol_id != recorded:
        raise InvalidInput(
            f"{file}: its protocol has the id {protocols[0].protocol_id}",
            f"the recorded {recorded}: the file was edited",
            "take the file as it was written, or set the fields of [evaluate] instead",
        )
    return protocols


def with_protocols(config: Recipe, protocols: Sequence[EvaluationProtocol]) -> Recipe:
    """Return a recipe whose [evaluate], seed and random are those of the protocols.

    Extractors that the recipe names keep these names, their weights and references. A checkpoint for autoguidance has
    to be in the recipe, because a protocol knows its digest only. Raises InvalidInput for settings that do not fit the
    checkpoint.
    """
    first, evaluate = protocols[0], config.evaluate
    named = tuple(each.extractor for each in evaluate.for_each_extractor())
    known = _names_in_recipe(config)
    extractors = tuple(known.get(each.extractor) or _published_name(each) for each in protocols)
    settings: dict[str, Any] = {name: getattr(first, name) for name in _OF_EVALUATE}
    if extractors != named:
        settings |= {"extractor": extractors[0], "extractors": extractors if len(extractors) > 1 else ()}
        for name in ("extractor_weights", "reference"):
            settings[name] = _paths_for(extractors, getattr(evaluate, name), named[0])
    if first.autoguidance is None:
        settings |= {"autoguidance": None, "autoguidance_model": None}
    return replace(config, seed=first.seed, random=first.random, evaluate=replace(evaluate, **settings))


def overruled_fields(file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the fields to which overrides give other values than the first protocol of a file, which would win.

    The result has the protocol's values by dotted field. Raises the same errors as read_protocols and read_overrides.
    """
    content = read_overrides(overrides)
    evaluate = content.get("evaluate", {})
    given: dict[str, Any] = {name: value for name, value in content.items() if name in ("seed", "random")}
    given |= {f"evaluate.{name}": evaluate[name] for name in _OF_EVALUATE if name in evaluate}
    first = vars(read_protocols(file)[0])
    implied = implied_values(first["weights"])
    kept = {}
    for key, asked in given.items():
        name = key.removeprefix("evaluate.")
        value = list(first[name]) if isinstance(first[name], tuple) else first[name]
        if value != asked and not (value is None and asked == implied.get(name)):
            kept[key] = value
    return kept


def by_protocol_file(
    file: str, recipe_of: Callable[[LocatedCheckpoint], Recipe], overrides: Sequence[str] = ()
) -> Callable[[LocatedCheckpoint], Recipe]:
    """Return what `recipe_of` returns, with the protocols of a file. Raises the same errors as read_protocols.

    overrides: those by which recipe_of has changed the recipe. The function raises InvalidInput if one of them names
    other extractors or another guide than the protocols, or if a checkpoint would be scored by other protocols.
    """
    protocols = read_protocols(file)
    keys = {override.partition("=")[0].strip() for override in overrides}

    def with_file(opened: LocatedCheckpoint) -> Recipe:
        given = recipe_of(opened)
        config = with_protocols(given, protocols)
        _require_kept(given, config, keys, file)
        settings = ScoringSettings.from_recipe(config)
        require_protocols(evaluation_protocols(settings, evaluation_protocol(settings, opened)), protocols, file)
        return config

    return with_file


def _require_kept(given: Recipe, config: Recipe, keys: Collection[str], file: str) -> None:
    """Raise InvalidInput if the protocols of a file have changed what the user has set: fields among keys."""
    for name in ("extractor", "extractors", "autoguidance"):
        found, expected = getattr(given.evaluate, name), getattr(config.evaluate, name)
        if f"evaluate.{name}" in keys and found != expected:
            raise InvalidInput(
                f"--set evaluate.{name}: found {found!r} with {file}",
                f"{expected!r}, as in this protocol",
                "leave out one of the two",
            )


def _names_in_recipe(config: Recipe) -> dict[str, str]:
    """Return the recipe's names of its extractors by those in protocols, without extractors that are not there."""
    names = {}
    for each in ScoringSettings.from_recipe(config).each_extractor:
        try:
            names[each.extractor.name] = each.evaluate.extractor
        except (NotFound, InvalidInput):
            continue
    return names


def _published_name(protocol: EvaluationProtocol) -> Any:
    """Return a protocol's extractor without the digest at the end of its name, which weights of one's own have."""
    return protocol.extractor.removesuffix(f"-{protocol.extractor_sha256[:8]}")


def _paths_for(extractors: Collection[str], paths: str | dict[str, str] | None, first: str) -> Any:
    """Return the paths of some extractors alone. first: the extractor that a path without a name is for."""
    if isinstance(paths, dict):
        return {name: path for name, path in paths.items() if name in extractors} or None
    return {first: paths} if paths and len(extractors) > 1 and first in extractors else paths


def require_protocols(
    found: Sequence[EvaluationProtocol],
    wanted: Sequence[EvaluationProtocol],
    file: str,
    do: str = "use the same real images, weights and autoencoder (--recipe, --reference), or leave out --protocol",
) -> None:
    """Raise InvalidInput if an evaluation would have other protocols than those of a file, naming a field.

    do: what to do about it.
    """
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.protocol_id == theirs.protocol_id:
            continue
        mine, recorded = ours.to_dict(), theirs.to_dict()
        names = [name for name in recorded | mine if mine.get(name) != recorded.get(name)]
        shown = ", ".join(f"{name} = {json.dumps(mine.get(name))}" for name in names)
        expected = ", ".join(f"{name} = {json.dumps(recorded.get(name))}" for name in names)
        raise InvalidInput(
            f"protocol {ours.protocol_id} with {shown}",
            f"{theirs.protocol_id} of {file}, with {expected}",
            do,
        )


def check_given_protocol(protocol: EvaluationProtocol, settings: ScoringSettings, opened: LocatedCheckpoint) -> None:
    """Raise InvalidInput if samples of a checkpoint cannot be drawn, decoded and scored as a given protocol says.

    The protocol decides how samples are drawn. The decoder is the checkpoint's, and the extractor and the real images
    are those of the settings, so a protocol with others would name what the numbers are not of.
    """
    check_sample_size(settings.images, opened)
    drawn = replace(settings.evaluate, sampler=protocol.sampler, sampling_steps=protocol.sampling_steps)
    check_sampling_steps(drawn, opened.record.process_kind)
    opened.weights_files(protocol.weights)
    used = replace(protocol, decoder=decoder_digest(opened), uint8_rule=UINT8_RULE, **scoring_fields(settings))
    do = "use the same real images, extractor and autoencoder, or leave out the protocol"
    require_protocols([used], [protocol], "the given one", do)
