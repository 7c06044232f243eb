"""The names of all tags that raydit sets in MLflow: on runs, LoggedModels and registered versions."""

from collections.abc import Mapping

STAGE = "raydit.stage"
"""Stage of a run: pipeline, autoencoder, encode, train, evaluate, evaluations, tune or autoencoders."""
JOB_ID = "raydit.job_id"
"""Submission id of the Ray job that a run belongs to."""
OUTPUT = "raydit.output"
"""Absolute path or URI of the recipe's output folder."""
LATENTS = "raydit.latents"
"""Path or URI of the latent data set that a run wrote."""
LATENTS_FINGERPRINT = "raydit.latents_fingerprint"
IMAGES = "raydit.images"
"""Path or URI of images that were scored without a checkpoint, or that an autoencoder was judged on."""
AUTOENCODER = "raydit.autoencoder"
"""Hub id, path or URI of an autoencoder that was judged."""
CHECKPOINT = "raydit.checkpoint"
"""Path or URI of a checkpoint."""
CHECKPOINT_DIGEST = "raydit.checkpoint_digest"
START = "raydit.start"
"""On the run of a training: path or URI of the checkpoint that it started from."""
START_SHA256 = "raydit.start_sha256"
"""On the run of a training: sha256 of the weights that it started from."""
BASE_DIGEST = "raydit.base_digest"
"""On the run of a training of an adapter: digest of the checkpoint that holds the base's weights, which must stay."""
PROTOCOL_ID = "raydit.protocol_id"
PROTOCOL = "raydit.protocol"
"""Summary of the protocol, next to its id."""
PROTOCOLS = "raydit.protocols"
"""On the run of an evaluation by several extractors: JSON with the protocol id of each of them, by its name.

PROTOCOL_ID and PROTOCOL are then of the first."""
HELD_OUT_DIGEST = "raydit.held_out_digest"
"""On the run of an evaluation: digest of the real images that its ratios are to, where its protocol does not say it."""
DISQUALIFIED = "raydit.disqualified"
"""On the run of an evaluation: why its checkpoint can be neither best nor champion, whatever its metrics."""
SCORES = "raydit.scores"
"""On the run of a training, followed by a dot and a protocol's id: the names of its metrics eval/NAME by that protocol.

Older versions have one tag without an id: JSON with the id of each metric's protocol."""
REMOVED = "raydit.removed"
"""Set on a LoggedModel when the files of its checkpoint have been removed."""

EXPERIMENT = "raydit.experiment"
"""Set on an experiment that replaces a deleted one: the name of the recipe."""
REPLACES = "raydit.replaces"
"""Set on a run that replaces a deleted one: the id of that run."""
SETTING_PREFIX = "raydit.setting."
"""Followed by the dotted name of a recipe's field: a value that may be another when an interrupted stage resumes.

MLflow's params keep the value of the first attempt forever, and refuse another one."""

VERSION_PREFIX = "raydit.version."
"""Followed by the name of a package: its version."""
HARDWARE = "raydit.hardware"
CODE_DIRTY = "raydit.code_dirty"
"""Whether the code had uncommitted changes: "true" or "false"."""

VERSION_DIGEST = "raydit.digest"
"""Digest of the checkpoint that a registered version is a copy of."""
VERSION_WEIGHTS = "raydit.weights_sha256"
"""Digest of the weights that a registered version samples by; older versions lack it."""
VERSION_METRIC = "raydit.metric"
"""Name of the metric by which a registered version was promoted."""
VERSION_VALUE = "raydit.value"
VERSION_ERROR = "raydit.error"
"""Standard error of VERSION_VALUE; "inf" if unknown."""
VERSION_STEP = "raydit.step"
PREVIOUS_VERSION = "raydit.before"
"""Number of the registered version that held the alias before this one; followed by a dot and the alias.

Versions of older installations have the tag without an alias."""

# MLflow's own names, which its UI shows.
COMMIT = "mlflow.source.git.commit"
DESCRIPTION = "mlflow.note.content"
PARENT_RUN = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"


def previous_tag(alias: str) -> str:
    """Return the tag of a registered version with the number of the version that held an alias before it."""
    return f"{PREVIOUS_VERSION}.{alias}"


def previous_version(version_tags: Mapping[str, str], alias: str) -> str:
    """Return the number of the version that held an alias before the version with these tags; empty if none did."""
    return version_tags.get(previous_tag(alias), version_tags.get(PREVIOUS_VERSION, ""))


def has(tag: str, value: str) -> str:
    """Return a filter for MLflow's searches: the tag has this value."""
    return f"tags.`{tag}` {equals(value)}"


def equals(value: str) -> str:
    """Return the second half of a filter for MLflow's searches: what stands before it has this value.

    MLflow's filters know no escaped quotes: of a value with both kinds, the single ones match any character.
    """
    if "'" not in value:
        return f"= '{value}'"
    return f'= "{value}"' if '"' not in value else "LIKE '{}'".format(value.replace("'", "_"))
