"""`raydit submit`: the same command, as a job on a cluster.

On this machine a job sees the same files, so paths are made absolute. On another one it gets the working directory
along (see cluster.job_package), and reads and writes data where the cluster does: at URIs and absolute paths.
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from cluster import job_package, job_server, jobs, storage
from pipelines.artifacts import digest_of
from pipelines.cli.command_line import CommandLine
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.tracking.store import tracking_uri

PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "GOOGLE_CLOUD_PROJECT",
)
"""Where storage and tracking are. Never who we are: credentials are the cluster's own."""
OWN_PACKAGES = ("cluster", "dit", "evaluation", "pipelines", "raydit")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A raydit command, ready to be sent."""

    command: list[str]
    name: str
    """Of the recipe, or of what the command is about."""
    env: dict[str, str]
    tracking: str = ""
    """Where its runs are recorded, if that is decided here."""
    recipe: str = ""
    """The recipe's text."""
    package: job_package.Package | None = None
    """The working directory, for a job on another machine."""
    pip: tuple[str, ...] = ()

    @property
    def job_id(self) -> str:
        content = [self.recipe, self.package.digest()] if self.package else [self.recipe]
        return job_id(self.name, self.command, *content, *self.pip)


def submit_command(command: CommandLine, *, address: str | None, wait: bool, pack: bool | None, pip: bool) -> int:
    """Start a raydit command on the cluster whose dashboard is at `address`; returns the exit code.

    The same content submitted again while it runs is joined, not started twice. pack: whether the working directory
    is sent along; left out, it is for a server that is not at a loopback address. pip: let the cluster install what
    raydit needs, in the versions that are installed here.
    """
    address = job_server.server_url(address)
    if pack or pip or (pack is None and not job_server.is_this_machine(address)):
        submission = packed(command, Path.cwd(), pip=pip)
    else:
        submission = unpacked(command)
    job, joined = start(submission, address)
    say("submit", f"job {job} at {address}{', running already' if joined else ''}")
    if submission.package and not joined:
        size = f"{len(submission.package.files):,} files, {submission.package.num_bytes / 2**20:.1f} MiB"
        say("submit", f"sent {size}: the working directory without data, outputs and what .gitignore names")
    if not wait:
        say("submit", f"follow it with: {follow_command(job, address)}")
        return 0
    return follow(job, address)


def start(submission: Submission, address: str) -> tuple[str, bool]:
    """Start a job or join the one that runs; its id, and whether it ran already."""
    number, submission_id = 1, submission.job_id
    known = {job.submission_id: job for job in jobs.list_jobs(address)}
    while (earlier := known.get(submission_id)) is not None and earlier.has_ended:
        number += 1
        submission_id = f"{submission.job_id}-{number}"
    metadata = {"raydit.name": submission.name, "raydit.tracking": submission.tracking}
    with tempfile.TemporaryDirectory() as folder:
        archive = None
        if submission.package and not earlier:
            archive = Path(folder) / "package.zip"
            submission.package.write(archive)
        jobs.submit(
            submission.command,
            address=address,
            submission_id=submission_id,
            env=submission.env,
            metadata=metadata,
            working_dir=str(archive) if archive else None,
            pip=submission.pip,
        )
    return submission_id, earlier is not None


def follow(job: str, address: str | None) -> int:
    """Pass on a job's log and return its exit code; Ctrl-C leaves the job running."""
    try:
        return jobs.follow(job, address, write=click.echo)
    except KeyboardInterrupt:
        say("submit", f"detached; job {job} goes on. Follow it again: {follow_command(job, address)}")
        say("submit", f"end it: raydit jobs stop {job} --address {job_server.server_url(address)}")
        return jobs.INTERRUPTED


def follow_command(job: str, address: str | None) -> str:
    return f"raydit jobs logs -f {job} --address {job_server.server_url(address)}"


def job_id(name: str, command: list[str], *content: str) -> str:
    """A readable id that is the same for the same command and content, and can stand in a URL."""
    readable = re.sub(r"[^\w.-]+", "-", f"raydit-{command[0]}-{name}")
    return f"{readable}-{digest_of([command, *content])[:8]}"


def unpacked(command: CommandLine) -> Submission:
    """For a job server on this machine: a job starts in a folder of its own, but sees the files that are here."""
    config, text = read_recipe(command)
    env = job_environment()
    tracking = (config and config.tracking.uri) or env["MLFLOW_TRACKING_URI"]
    return Submission(
        command=prepare(command, config), name=name_of(command, config), env=env, tracking=tracking, recipe=text
    )


def packed(command: CommandLine, folder: Path, *, pip: bool = False) -> Submission:
    """For a job on another machine, which sees what is packed, URIs, and absolute paths that it has too."""
    config, text = read_recipe(command)
    extra = own_code(folder) if pip else {}
    if command.recipe is not None:
        recipe = Path(command.recipe).absolute()
        inside = recipe.is_relative_to(folder)
        name = recipe.relative_to(folder).as_posix() if inside else f"submitted/{recipe.name}"
        command = command.with_recipe(name)
        extra |= {name: recipe}
    package = job_package.pack(folder, extra)
    for key, path in [*relative_places(config).items(), *relative_arguments(command)]:
        refuse_unreachable(key, path, package)
    env = sendable_environment()
    if left := sorted(given_environment().keys() - env.keys()):
        say("submit", f"{', '.join(left)}: of this machine only, so the cluster's own setting counts")
    return Submission(
        command=command.texts,
        name=name_of(command, config),
        env=env,
        tracking=(config and config.tracking.uri) or env.get("MLFLOW_TRACKING_URI", ""),
        recipe=text,
        package=package,
        pip=tuple(job_package.pinned_requirements("raydit")) if pip else (),
    )


def read_recipe(command: CommandLine) -> tuple[Recipe | None, str]:
    """The recipe of a command and its text, if it has one. Bad ones are refused here, before anything is sent."""
    if command.recipe is None:
        return None, ""
    from pipelines.config.reader import load_recipe

    config = load_recipe(command.recipe, command.overrides)
    return config, Path(command.recipe).read_text(encoding="utf-8")


def own_code(folder: Path) -> dict[str, Path]:
    """raydit itself, for a cluster without it; the working directory's own comes first."""
    root = Path(__file__).resolve().parents[2]
    files = [file for name in OWN_PACKAGES for file in (root / name).rglob("*") if file.suffix in (".py", ".toml")]
    names = {file.relative_to(root).as_posix(): file for file in files}
    return {} if (folder / "pipelines" / "cli" / "__main__.py").is_file() else names


def relative_places(config: Recipe | None) -> dict[str, str]:
    """Paths of a recipe that depend on the working directory, by field."""
    if config is None:
        return {}
    places: dict[str, str | None] = {"output": config.output}
    if config.images.path != "digits":
        places["images.path"] = config.images.path
    if config.autoencoder.id and Path(config.autoencoder.id).exists():
        places["autoencoder.id"] = config.autoencoder.id
    for name in ("reference", "extractor_weights"):
        places[f"evaluate.{name}"] = getattr(config.evaluate, name)
    return {key: path for key, path in places.items() if path and is_relative(path)}


def relative_arguments(command: CommandLine) -> list[tuple[str, str]]:
    found = [word.text for word in command.places if is_relative(word.text) and Path(word.text).exists()]
    return [(command.name, text) for text in found if text != command.recipe]


def is_relative(path: str) -> bool:
    return storage.is_local(path) and not path.startswith("file://") and not Path(path).is_absolute()


def refuse_unreachable(key: str, path: str, package: job_package.Package) -> None:
    """Refuse what would be looked for in a job's own folder, which is empty but for the package, and is not kept."""
    if key == "output" or not package.contains(path):
        raise ValueError(
            f"{key}: found {path!r}, a place on this machine that a job on another one does not have; expected a URI "
            "(s3://BUCKET/...) or the absolute path of a mount that all nodes of the cluster share"
        )


def given_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def sendable_environment() -> dict[str, str]:
    """What of it another machine can use."""
    return {key: value for key, value in given_environment().items() if not is_of_this_machine(value)}


def is_of_this_machine(value: str) -> bool:
    """Whether a setting names a place that only this machine reaches: its own disk, or its loopback address."""
    if value.startswith(("http://", "https://")):
        return job_server.is_this_machine(value)
    return value.startswith(("sqlite:", "file:", "/", "."))


def prepare(command: CommandLine, config: Recipe | None) -> list[str]:
    """The command with absolute paths; config: its recipe."""
    fixed = [f"{key}={json.dumps(path)}" for key, path in absolute_places(config).items()] if config else []
    return [*command.with_places(absolute_if_here).texts, *(part for each in fixed for part in ("--set", each))]


def name_of(command: CommandLine, config: Recipe | None) -> str:
    """A short name: its recipe's, or that of a checkpoint or images."""
    if config and command.subject == command.recipe:
        return config.name
    return Path(command.subject).name if command.subject else "job"


def absolute_places(config: Recipe) -> dict[str, str]:
    """The recipe's paths, by field: of what a job reads and writes, it finds nothing relative to its own folder."""
    places: dict[str, str | None] = {"output": absolute(config.output)}
    if config.images.path != "digits":
        places["images.path"] = absolute(config.images.path)
    places["autoencoder.id"] = config.autoencoder.id and absolute_if_here(config.autoencoder.id)
    for name in ("reference", "extractor_weights"):
        path = getattr(config.evaluate, name)
        places[f"evaluate.{name}"] = path and absolute(path)
    return {key: path for key, path in places.items() if path}


def absolute(path: str) -> str:
    return str(Path(path).absolute()) if storage.is_local(path) else path


def absolute_if_here(place: str) -> str:
    """Absolute path of what exists here, or will be written into a folder that does; anything else as it is."""
    if not storage.is_local(place):
        return place
    into_folder = os.sep in place and Path(place.split(os.sep)[0]).is_dir()
    return absolute(place) if into_folder or Path(place).exists() else place


def job_environment() -> dict[str, str]:
    """Where storage is, and where the job tracks: where the command would, run here."""
    return given_environment() | {"MLFLOW_TRACKING_URI": tracking_uri()}
