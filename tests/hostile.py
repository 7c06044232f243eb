"""Readers of users' files, called on hostile files in a process of their own, with little memory and for a short time.

A file must be read, or refused with one of raydit's errors; an image may also be quarantined. Whatever else happens is
the reader's fault: another exception, a crash, the end of the memory, or no end.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY_MIB = 1536
"""Memory that a reader may claim beyond what its process has after its imports."""
SECONDS = 60
"""Time for one file: far more than any takes, on a busy machine too."""


def read_images(path: str) -> str:
    """List a data set and decode all its images."""
    from pipelines.config.recipe import ImagesConfig
    from pipelines.images.decoding import quarantine_reason
    from pipelines.images.open import open_source

    source = open_source(ImagesConfig(path=path, size=8))
    listing = source.listing()
    assert len(listing.digest) == 64
    reasons = []
    for image in source.read(listing.keys, listing.locations):
        if isinstance(image, MemoryError | RecursionError):
            raise image
        if isinstance(image, Exception):
            reasons.append(quarantine_reason(image))
    return f"{len(listing)} images, quarantined {reasons[:3]}"


def read_recipe(path: str) -> str:
    from pipelines.config.reader import load_recipe

    return load_recipe(path).name


def take_lease(path: str) -> str:
    """Hold the folder of a lease file that somebody else has written."""
    from cluster.storage import lease

    lease.SILENCE_SECONDS = 0.0
    with lease.hold_folder(str(Path(path).parent), on_lost=print, wait_seconds=0.0) as earlier:
        return f"held before by {earlier}"


def read_checkpoint(path: str) -> str:
    """Open a checkpoint, whose record somebody may have signed again, and load its model as an evaluation does."""
    from dit.checkpoint import load_checkpoint
    from dit.formats.weights import check_weights, load_weights
    from dit.model import build_model, meta_state
    from dit.objective import create_process

    opened = load_checkpoint(path)
    weights, config = opened.weights(), opened.record.model_config
    check_weights(meta_state(config), weights)
    load_weights(build_model(config), weights)
    create_process(**opened.record.objective)
    return f"step {opened.step}, {opened.trainer_state}"


def read_signed_checkpoint(path: str) -> str:
    """Read a checkpoint whose digests are made again after the change, as somebody with bad intentions would."""
    from dit.formats.completion import write_completion

    with contextlib.suppress(ValueError, TypeError, RecursionError):  # what is no JSON object is left as it is
        write_completion(Path(path), json.loads((Path(path) / "config.json").read_bytes()))
    return read_checkpoint(path)


def read_latents(path: str) -> str:
    from pipelines.latents.dataset import LatentDataset

    dataset = LatentDataset.open(path)
    return f"{len(dataset.arrays.labels)} rows, {len(dataset.read_quarantine())} quarantined"


def read_latents_without_moments(path: str) -> str:
    """Read what training reads of a data set whose images it encodes, but for the images."""
    from pipelines.config.recipe import ImagesConfig
    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.source_images import SourceImages

    source = SourceImages(LatentDataset.open(path), ImagesConfig(path="digits"), locations=None)
    return f"{len(source.labels)} rows, {source.keys([0])}"


def read_reference(path: str) -> str:
    from evaluation.reference import ReferenceStatistics

    with open(path, "rb") as file:
        return f"{ReferenceStatistics.load(file, path).n} images"


def read_report(path: str) -> str:
    """Read a report, and show it in both forms."""
    from evaluation.pages.report_page import render_page
    from pipelines.scoring.reports.report_files import read_report

    report = read_report(path)
    return f"{report.headline} {len(report.table())} {len(render_page(report))}"


def read_card(path: str) -> str:
    """Read a card of an evaluation, and show it."""
    from evaluation.pages.card_text import render_card
    from pipelines.scoring.cards import read_card

    card = read_card(path)
    return f"{card.digest} {len(render_card(card))}"


def read_journal(path: str) -> str:
    """Deliver a journal to a server that takes nothing but notes what it was given."""
    from pipelines.tracking.journal import Journal, Refused, has_open_runs

    class Server:
        def deliver(self, entries, ids, history):
            raise Refused(f"{entries[0]['op']} of {entries[0]['run']}")

        def on_unavailable(self, reason):
            pass

        def on_refused(self, entry, reason):
            pass

    journal = Journal(Path(path), Server())
    assert journal.close(30), "the thread of the journal has ended"
    return f"{len(journal.entries())} entries, {journal.retry_refused()}, {has_open_runs(Path(path))}"


def read_official(path: str) -> str:
    from dit.formats.official import read_official

    return str(read_official(path, num_heads=2).config)


def read_adapter(path: str) -> str:
    """Read an adapter, and merge it into weights that it fits."""
    import torch

    from dit.formats.adapter import merge_adapters, read_adapter

    adapter = read_adapter(path)
    merged = merge_adapters({"a.weight": torch.zeros(4, 3), "b.weight": torch.ones(2)}, [(adapter, 1.0)])
    return f"{len(merged)} tensors"


def read_autoencoder(path: str) -> str:
    from dit.autoencoder import Autoencoder, describe_autoencoder

    Autoencoder.load(path)
    return str(describe_autoencoder(Path(path)))


READERS: dict[str, Callable[[str], str]] = {
    "images": read_images,
    "recipe": read_recipe,
    "lease": take_lease,
    "checkpoint": read_checkpoint,
    "signed checkpoint": read_signed_checkpoint,
    "latents": read_latents,
    "latents without moments": read_latents_without_moments,
    "reference": read_reference,
    "report": read_report,
    "evaluation card": read_card,
    "journal": read_journal,
    "official": read_official,
    "adapter": read_adapter,
    "autoencoder": read_autoencoder,
}
"""What is read, by name. A reader takes a path and returns a line about what it found."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    path: str
    kind: str
    """"read", "refused" (one of raydit's errors), or "failed" (anything else)."""
    detail: str


def read_all(reader: str, paths: Sequence[str | Path], *, seconds: int = SECONDS, memory_mib: int = MEMORY_MIB):
    """Return the Outcome of each path, read one after the other in a process that is replaced when it dies."""
    waiting, outcomes = [str(path) for path in paths], []
    while waiting:
        done = _run_child(reader, waiting, seconds, memory_mib)
        outcomes += done
        waiting = waiting[len(done) :]
    return outcomes


def read_one(reader: str, path: str | Path, **limits: int) -> Outcome:
    """Return the Outcome of one path."""
    return read_all(reader, [path], **limits)[0]


def _run_child(reader: str, paths: list[str], seconds: int, memory_mib: int) -> list[Outcome]:
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as errors:
        given.write("\n".join(paths))
        given.seek(0)
        command = [sys.executable, str(Path(__file__)), reader, str(seconds), str(memory_mib)]
        # Arrow's own pool reserves a gigabyte at a time, of which it uses a part.
        env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        child = subprocess.run(
            command, stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=env
        )
        outcomes = [Outcome(**json.loads(line)) for line in child.stdout.splitlines() if line.startswith("{")]
        if len(outcomes) < len(paths):
            errors.seek(0)
            text = errors.read()[-500:]
            died = "did not end" if child.returncode == -14 else f"ended the process with {child.returncode}: {text}"
            outcomes.append(Outcome(paths[len(outcomes)], "failed", died))
    return outcomes


def _main(reader: str, seconds: str, memory_mib: str) -> None:
    """Read the paths on standard input, a line each, and print an Outcome as JSON for each."""
    import signal

    sys.path.insert(0, str(ROOT))
    import numpy  # noqa: F401
    import PIL.Image
    import pyarrow.dataset  # noqa: F401
    import pyarrow.json  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import yaml  # noqa: F401

    import cluster.storage.lease  # noqa: F401
    import pipelines.config.reader  # noqa: F401
    import pipelines.images.open  # noqa: F401

    if reader not in ("images", "recipe", "lease", "journal"):
        import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
        import torch

        torch.set_num_threads(1)
    PIL.Image.init()
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + int(memory_mib) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from raydit.errors import RayditError

    for path in sys.stdin.read().split("\n"):
        signal.alarm(int(seconds))  # without a handler: it ends the process, also in a library's code
        try:
            kind, detail = "read", READERS[reader](path)
        except RayditError as error:
            kind, detail = "refused", f"{type(error).__name__}: {error}"
        except BaseException as error:
            trace = error.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            kind, detail = "failed", f"{type(error).__name__}: {str(error)[:300]} at {where}"
        signal.alarm(0)
        print(json.dumps({"path": path, "kind": kind, "detail": detail}), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
