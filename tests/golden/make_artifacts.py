"""Writes 707a9da/artifacts.zip and reference.npz: what the stages of commit 707a9da left on storage.

Run it with the code of that commit:
    git worktree add OLD 707a9da; cd OLD; PYTHONPATH=. python .../make_artifacts.py .../707a9da
The recipe is artifacts.toml beside this file. Absolute paths in JSON files are replaced by @FOLDER@.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = Path(__file__).resolve().parent / "artifacts.toml"
LEFT_OUT = ("output/references/", "output/.tracking/", "output/figures/", "mlflow.db", "mlruns/")
"""The reference's covariance alone takes 13 MB, and the store has a golden file of its own."""


def write_images(folder: Path) -> None:
    """24 smooth coloured images of 20 pixels in two class folders, one of them unreadable."""
    rng = np.random.default_rng(0)
    for name in ("blob", "ring"):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image.resize((20, 20), Image.Resampling.BICUBIC).save(folder / name / f"{index:03d}.png")
    (folder / "blob" / "broken.png").write_bytes(b"no image")


def write_reference(path: Path) -> None:
    """Statistics of eight dimensions: the format of a reference without its size."""
    from evaluation.reference import ReferenceStatistics

    features = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    reference = ReferenceStatistics(
        n=20,
        mu=features.mean(axis=0, dtype=np.float64),
        sigma=np.cov(features.astype(np.float64), rowvar=False),
        features=features,
        keys=np.array([f"image-{index}" for index in range(20)]),
        extractor="golden",
        extractor_sha256="0" * 64,
        size=16,
        crop="adm",
        source="images",
    )
    with open(path, "wb") as file:
        reference.save(file)


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        code = os.environ["PYTHONPATH"].split(os.pathsep)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in code)}
        env.pop("MLFLOW_TRACKING_URI", None)
        subprocess.run([sys.executable, "-m", "pipelines.cli", "run", str(RECIPE)], cwd=folder, env=env, check=True)
        with zipfile.ZipFile(out / "artifacts.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*")):
                path = file.relative_to(folder).as_posix()
                if not file.is_file() or path.startswith(LEFT_OUT) or path.endswith((".html", ".lease.json")):
                    continue
                content = file.read_bytes()
                if file.suffix == ".json":
                    content = content.replace(name.encode(), b"@FOLDER@")
                archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
    write_reference(out / "reference.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
