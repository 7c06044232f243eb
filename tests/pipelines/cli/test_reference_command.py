"""`raydit reference build` names its file as protocols do."""

import hashlib
import json

import numpy as np
import pytest
from tiny import tiny_recipe

from evaluation.reference import ReferenceStatistics
from pipelines.scoring.real_images.references import reference_digest, save_reference
from pipelines.scoring.settings import ScoringSettings


@pytest.mark.parametrize("source", ["/data/cats", "/mnt/cats"])
def test_the_digest_of_a_built_reference_is_that_of_protocols(tmp_path, monkeypatch, raydit, source):
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    built = ReferenceStatistics(n=9, **moments, extractor="e", extractor_sha256="s", size=32, source=source)

    def build_reference(config, out, *, address=None):
        save_reference(built, out)
        return built

    monkeypatch.setattr("pipelines.build_reference.build_reference", build_reference)
    out = tmp_path / "r.npz"
    code, said, _ = raydit("reference", "build", "digits", "--out", str(out), "--size", "32", "--json")
    assert code == 0
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert json.loads(said.splitlines()[-1])["digest"] == digest and f"digest {digest[:12]}\n" in said
    settings = ScoringSettings.from_recipe(tiny_recipe(tmp_path, f"evaluate.reference={out}"))
    assert reference_digest(settings) == digest
