"""A search that was cut off between writing its result and logging it ends its run when it is called again."""

import json
from types import SimpleNamespace

from fakes import FakeContext

from pipelines import tune as tune_module
from pipelines.config.tune import TuneGrid
from pipelines.tune import TUNING, tune


def test_a_search_that_was_killed_at_its_end_logs_its_result(tmp_path, monkeypatch):
    candidate = SimpleNamespace(config=SimpleNamespace(output=str(tmp_path)))
    monkeypatch.setattr(tune_module, "plan_candidates", lambda *arguments: [candidate])
    monkeypatch.setattr(tune_module, "tune_rungs", lambda config: [20])
    monkeypatch.setattr(tune_module, "tune_identity", lambda *arguments: {"samples": [20]})
    folder = tmp_path / TUNING / tune_module.digest_of({"samples": [20]})[:12]
    (folder / "records").mkdir(parents=True)
    (folder / "tune.json").write_text(json.dumps({"best": 0}))
    checkpoint = SimpleNamespace(origin="step_0000002", digest="d")
    for logged in ([(str(folder / "tune.json"), None)], []):
        context = FakeContext()
        found = tune([checkpoint], lambda opened: candidate.config, TuneGrid(), context=context)
        assert (found.folder, found.content) == (str(folder), {"best": 0})
        assert context.last_run.files == logged and not (folder / "records").exists()
