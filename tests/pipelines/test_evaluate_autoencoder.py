"""`raydit autoencoders` on a real Ray: one report for any number of workers, resumed, and compared."""

import json
from pathlib import Path

import pytest
from tiny import BROKEN, places
from tiny_autoencoders import write_autoencoder
from tiny_checkpoint import tiny_output

from evaluation.autoencoder_report import AutoencoderReport
from pipelines.stage import StageContext

SPEEDS = {"encode_images_per_second", "decode_images_per_second"}


@pytest.fixture
def flags(tmp_path):
    """Flags by which the output's autoencoder is judged on 20 images, and another one beside it."""
    tiny_output(tmp_path)
    (tmp_path / "images" / BROKEN).unlink()
    store = next(place for place in places(tmp_path) if place.startswith("tracking.uri"))
    flags = ["--images", str(tmp_path / "images"), "--num", "20", "--extractor", "efficientnet-lite0", "--json"]
    return [*flags, "--set", store, "--set", "evaluate.shard_rows=8", "--set", "encode.batch_size=4"]


def test_a_plan_touches_nothing_and_mistakes_are_told_at_once(flags, raydit, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, err = raydit("autoencoders", "evaluate", str(tmp_path / "output"), *flags, "--dry-run")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["images"] == 20 and "20 images, protocol" in out
    code, _, err = raydit("autoencoders", "evaluate", str(tmp_path / "output"), *flags, "--size", "17", "--dry-run")
    assert code == 2 and "multiple of 2" in err
    code, _, err = raydit("autoencoders", "evaluate", str(tmp_path / "nothing"), *flags, "--size", "16", "--dry-run")
    assert code == 2 and "no autoencoder at" in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_autoencoders_are_judged_and_compared(flags, raydit, local_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = str(tmp_path / "output")
    reports = []
    for workers in ("1", "2"):
        more = ["--out", f"judged-{workers}", "--set", f"evaluate.num_workers={workers}"]
        code, out, err = raydit("autoencoders", "evaluate", trained, *flags, *more)
        assert code == 0, err
        reports.append(AutoencoderReport.from_json(out.splitlines()[-1]))
    first, second = ({k: v for k, v in each.metrics.items() if k not in SPEEDS} for each in reports)
    assert first == pytest.approx(second, rel=1e-9)
    assert reports[0].protocol == reports[1].protocol and "rfd_efficientnet_lite0_20" in first
    assert first["bytes_per_image"] == 2 * 8 * 8 * 8
    folder = tmp_path / "judged-1" / reports[0].protocol.protocol_id
    files = {"report.json", "report.html", "reconstructions.png", "pictures.npz"}
    assert {file.name for file in folder.iterdir()} == files
    assert "data:image/png" in (folder / "report.html").read_text()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`raydit.stage` = 'autoencoders'")
    assert [run.data.metrics["autoencoder/psnr"] for run in runs] == 2 * [pytest.approx(first["psnr"])]
    assert {run.data.tags["raydit.protocol_id"] for run in runs} == {reports[0].protocol.protocol_id}

    write_autoencoder("AutoencoderDC", tmp_path / "dc")
    code, out, err = raydit("autoencoders", "compare", trained, "dc", *flags, "--out", "judged-1", "--size", "16")
    assert code == 0, err
    assert f"already finished: {tmp_path / 'output' / 'autoencoder'}" in out and "* best value" in out
    compared = json.loads(out.splitlines()[-1])
    assert len(compared["reports"]) == 2 and "<strong>" in Path(compared["page"]).read_text()
    monkeypatch.setattr(StageContext, "start_ray", lambda *_: pytest.fail("Ray was started"))
    code, out, _ = raydit("autoencoders", "evaluate", trained, *flags, "--out", "judged-1")
    assert code == 0 and AutoencoderReport.from_json(out.splitlines()[-1]) == reports[0]
