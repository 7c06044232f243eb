"""Valid artifacts of raydit whose files are changed: checkpoints, latents, references, reports, journals, weights."""

import atexit
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_checkpoint import MODEL, random_network, tiny_output, write_checkpoint
from tiny_latents import make_record
from tiny_story import write_latents

from dit.formats.adapter import AdapterConfig, write_adapter
from evaluation.card import CheckpointFacts, EvaluationCard, LatentsFacts
from evaluation.merge_reports import merge_reports
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset, write_manifest


@cache
def output_folder() -> Path:
    """Return an output with a checkpoint, latents and an autoencoder, which is made once and copied."""
    folder = Path(mkdtemp(prefix="raydit-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = tiny_output(folder)
    write_checkpoint(config, 2)
    write_latents(config)
    return Path(config.output)


def make_part(name: str) -> Callable[[Path], Path]:
    """Return what copies a part of the output into a folder."""
    return lambda folder: Path(shutil.copytree(output_folder() / name, folder / Path(name).name))


def make_latents_without_moments(folder: Path) -> Path:
    stored = LatentDataset.open(output_folder() / "latents")
    description = replace(stored.description, encoding={"dtype": "float32"})
    keys, digests = [f"k{row}" for row in range(9)], np.random.default_rng(0).integers(0, 256, (9, 16), np.uint8)
    table = schema.image_table(schema.latent_schema(description), keys, np.arange(9) % 3, digests, None)
    data, path = schema.parquet_bytes(table), folder / "latents"
    path.mkdir()
    (path / "part-00000.parquet").write_bytes(data)
    record = make_record(0, np.zeros((9, *description.moments_shape), "<f2"), data)
    write_manifest(str(path), description, stored.identity, [record], recipe={})
    return path


def make_reference(folder: Path) -> Path:
    rng, file = np.random.default_rng(0), folder / "reference.npz"
    meta = json.dumps({"n": 9, "extractor": "x", "extractor_sha256": "ab", "size": 8, "crop": "adm", "source": "here"})
    arrays = {"mu": rng.normal(size=4), "sigma": np.eye(4), "features": rng.normal(size=(9, 4)).astype(np.float32)}
    np.savez(file, meta=np.array(meta), keys=np.array([f"k{i}" for i in range(9)]), **arrays)
    return file


def make_report(folder: Path) -> Path:
    protocol = EvaluationProtocol(decoder="a", extractor="inception", extractor_sha256="c", reference_digest="d")
    report = EvaluationReport(protocol=protocol, checkpoint="x", checkpoint_digest="ab", metrics={"fid_50k": 2.0})
    report = replace(report, curve=[(1000, 3.0)], artifacts={"samples": "samples.png"})
    second = replace(report, protocol=replace(protocol, extractor="b"), metrics={"fd_b_50k": 4.0}, warnings=["few"])
    report, second = (
        replace(each, metrics={**each.metrics, name: 2.0}, deviations={name: [[0.5, -0.5], [0.25, -0.25]]})
        for each, name in ((report, "ratio_fid_50k"), (second, "ratio_fd_b_50k"))
    )
    report = merge_reports([report, second])
    (folder / "report.json").write_text(report.to_json())
    return folder / "report.json"


def make_card(folder: Path) -> Path:
    report = EvaluationReport.from_json(make_report(folder).read_bytes())
    (folder / "report.json").unlink()
    facts = CheckpointFacts(uri="x", digest="ab", step=1, model="m", parameters=2, bytes=3, files={"a": "b"})
    card = EvaluationCard(
        report=replace(report, artifacts={}),
        checkpoint=facts,
        latents=LatentsFacts(fingerprint="f", path="y", images=4),
        recipe={"name": "x", "images": {"path": "digits"}},
        environment={"torch": "2"},
        command="raydit evaluate x",
        date="2026-01-01",
    )
    (folder / "card.json").write_text(card.to_json())
    return folder / "card.json"


def repair_card(data: bytes) -> bytes:
    """Give a changed card the digest of its content."""
    try:
        content = json.loads(data)
        del content["digest"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return data  # what is no card stays as it is
    return json.dumps({**content, "digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


def make_journal(folder: Path) -> Path:
    lines = [
        {"op": "run", "run": "train-1", "time": 1, "experiment": "e", "name": "n", "parent": None, "tags": {}},
        {"op": "params", "run": "train-1", "time": 2, "params": {"a": "b"}},
        {"op": "metrics", "run": "train-1", "time": 3, "metrics": {"x": 1.0}, "step": 1, "model": "", "dataset": None},
        {"op": "artifact", "run": "train-1", "time": 4, "path": "/etc/hostname", "folder": None},
        {"op": "end", "run": "train-1", "time": 5, "status": "FINISHED"},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "a.state.json").write_text(json.dumps({"offset": 0, "known": {}, "uri": "sqlite:///x.db"}))
    return folder / "a.jsonl"


def make_shards(folder: Path) -> Path:
    weights = {name: tensor.contiguous() for name, tensor in random_network(0, MODEL).state_dict().items()}
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_adapter(folder: Path) -> Path:
    config = AdapterConfig(rank=2, alpha=3.0, layers=("a",), full=("b.weight",))
    factors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2), "b.weight": torch.zeros(2)}
    write_adapter(folder / "adapter", config, factors)
    return folder / "adapter"


def make_weights(folder: Path) -> Path:
    torch.save({"ema": random_network(0, MODEL).state_dict()}, folder / "w.pt")
    return folder / "w.pt"
