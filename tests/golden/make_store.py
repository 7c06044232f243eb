"""Writes older_store.json.gz: what an earlier version of raydit left in MLflow's database and in its journal.

Run it with the code of that version, of which the tests' tiny story is told:
    git archive COMMIT | tar x -C OLD; cd OLD; PYTHONPATH=.:tests python .../make_store.py .../older_store.json.gz
Paths in it are replaced by @FOLDER@.
"""

import gzip
import json
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

from tiny_story import tell_story

from pipelines.registry.promotion import promote_checkpoint
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import JOURNAL_FOLDER, Tracker


def away(*entries):
    raise ConnectionError("not at hand")


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        story = tell_story(folder)
        os.environ["MLFLOW_TRACKING_URI"] = story.uri
        promote_checkpoint(str(story.checkpoints[4].path), "tiny-dit")
        (journal,) = (folder / "output" / JOURNAL_FOLDER).glob("*.jsonl")
        untold = Tracker(Journal(journal, away, lambda reason: None), story.config.name, story.uri)
        run = untold.start_run("encode", {"untold": True})
        run.metrics({"encode/images": 24.0}, 0)
        run.end("FINISHED")
        database = sqlite3.connect(folder / "mlflow.db")
        state = json.loads(journal.with_suffix(".state.json").read_text())
        content = {
            "database": "\n".join(database.iterdump()),
            "told": journal.read_bytes()[: state["offset"]].decode(),
            "untold": journal.read_bytes()[state["offset"] :].decode(),
            "known": state["known"],
            "digests": {step: checkpoint.digest for step, checkpoint in story.checkpoints.items()},
        }
        text = json.dumps(content).replace(str(folder), "@FOLDER@").replace(str(Path.cwd()), "@FOLDER@")
        out.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
