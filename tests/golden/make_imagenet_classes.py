"""Write dit/imagenet_classes.tsv, the names of ImageNet's thousand classes, from the lists that timm ships.

Run it where timm is installed: python tests/golden/make_imagenet_classes.py
"""

from importlib.resources import files
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "dit" / "imagenet_classes.tsv"


def main() -> None:
    """Write a line for each class in the order of the labels: WordNet id, tab, names separated by commas."""
    lists = files("timm.data") / "_info"
    ids = (lists / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
    lines = (lists / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    names = dict(line.split("\t") for line in lines)
    TARGET.write_text("".join(f"{id}\t{names[id]}\n" for id in ids), encoding="utf-8")


if __name__ == "__main__":
    main()
