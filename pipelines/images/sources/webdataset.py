"""WebDataset: tar shards in which files of one name, but for their suffix, are one sample."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipelines.images.decoding import decode, is_image
from pipelines.images.files import Files
from pipelines.images.labels import LABEL_COLUMNS, number_labels, parse_numbers
from pipelines.images.listing import Listing
from pipelines.images.splits import pick_split
from pipelines.images.tar import Blocks, Member, TarError, members

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

SUFFIX = ".tar"


class TarShard(NamedTuple):
    """The samples of a tar file, in its order."""

    stems: list[str]
    images: list[Member]
    labels: list[str] | None
    """As text; None where no sample has a label."""


class WebDatasetSource:
    """Tar files of samples `stem.jpg`, `stem.cls`: keys are TAR/STEM. Labels are in `.cls` or in a field of `.json`.

    A listing reads the headers of every tar; with the places that it gives, an image is read by a seek.
    names: the tar files, relative to the root; when left out, all below it that belong to the wanted split.
    """

    def __init__(self, files: Files, config: "ImagesConfig", names: Sequence[str] | None = None):
        self.files, self.config, self.names = files, config, names

    def listing(self) -> Listing:
        names = self._find() if self.names is None else self.names
        shards = list(self.files.each(self._shard, names))
        keys = [f"{name}/{stem}" for name, shard in zip(names, shards, strict=True) for stem in shard.stems]
        images = [image for shard in shards for image in shard.images]
        labels, class_names = self._labels(names, shards)
        return Listing(
            keys,
            labels,
            np.array([image.stamp for image in images], np.int64),
            class_names,
            np.array([(image.offset, image.size) for image in images], np.int64),
        )

    def _find(self) -> list[str]:
        names = [name for name in self.files.listing()[0] if name.endswith(SUFFIX)]
        if not names:
            raise FileNotFoundError(
                f"images.path: no tar files in {self.files.root}; expected files ending in {SUFFIX}"
            )
        return pick_split(names, self.config.split, self.files.root)

    def _labels(self, names: Sequence[str], shards: list[TarShard]) -> tuple[np.ndarray, tuple[str, ...]]:
        texts: list[str] = []
        for name, shard in zip(names, shards, strict=True):
            if (shard.labels is None) != (shards[0].labels is None):
                raise ValueError(
                    f"images.path: {self.files.path(name)} and {self.files.path(names[0])}: found labels in one and "
                    "none in the other, expected them in every tar or in none. Write one of them anew"
                )
            texts += shard.labels or []
        if shards[0].labels is None:
            return np.zeros(sum(len(shard.stems) for shard in shards), np.int32), ()
        return number_labels(parse_numbers(texts), self.config.class_names, f"labels in {self.files.root}")

    def _shard(self, name: str) -> TarShard:
        where = self.files.path(name)
        with self.files.open(name) as file:
            blocks = Blocks(file, self.files.is_local)
            try:
                samples = _samples(members(blocks), where)
            except TarError as error:
                raise ValueError(f"images.path: {where}: {error}") from error
            chosen = {stem: self._image(parts, stem, where) for stem, parts in samples.items()}
            images = {stem: image for stem, image in chosen.items() if image is not None}
            if not images:
                found = ", ".join(sorted({kind for parts in samples.values() for kind in parts})[:10]) or "nothing"
                raise ValueError(
                    f"images.path: {where}: found no images but {found}, expected samples such as 0001.jpg and "
                    "0001.cls; take the tar away, or set images.image_column to the suffix of the images"
                )
            labels = {stem: self._label(samples[stem], blocks, f"{where}, sample {stem}") for stem in images}
        missing = next((stem for stem, label in labels.items() if label is None), None)
        if missing is None:
            return TarShard(list(images), list(images.values()), [str(label) for label in labels.values()])
        if any(label is not None for label in labels.values()):
            raise ValueError(
                f"images.path: {where}: found the sample {missing} without a label among others with one, expected it "
                "in every sample or in none. Write the tar anew"
            )
        return TarShard(list(images), list(images.values()), None)

    def _image(self, parts: dict[str, Member], stem: str, where: str) -> Member | None:
        if self.config.image_column is not None:
            return parts.get(self.config.image_column)
        kinds = [kind for kind in parts if is_image(f".{kind}")]
        kinds = [kind for kind in kinds if "." not in kind] or kinds  # a.jpg is the image, a.mask.png goes with it
        if len(kinds) > 1:
            raise ValueError(
                f"images.path: {where}: found {len(kinds)} images in the sample {stem} ({', '.join(kinds)}), expected "
                "one; set images.image_column to the suffix of one of them"
            )
        return parts[kinds[0]] if kinds else None

    def _label(self, parts: dict[str, Member], blocks: Blocks, where: str) -> object | None:
        """The label of a sample; the text of .cls, or a field of .json."""
        column = self.config.label_column
        if column in parts or (column is None and "cls" in parts):
            member = parts[column or "cls"]
            return blocks.at(member.offset, member.size).decode(errors="replace").strip()
        if "json" not in parts:
            return None
        member = parts["json"]
        try:
            fields = json.loads(blocks.at(member.offset, member.size))
        except ValueError as error:
            raise ValueError(f"images.path: {where}: found {error} in its .json, expected JSON; correct it") from error
        usual = (column,) if column is not None else LABEL_COLUMNS
        return next((fields[name] for name in usual if isinstance(fields, dict) and name in fields), None)

    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]:
        named = [_split_key(key) for key in keys]
        if places is None:
            places = [_index(self, name)[stem] for name, stem in named]
        at = zip((name for name, _ in named), places, strict=True)
        for name, group in groupby(at, key=lambda pair: pair[0]):
            with self.files.open(name) as file:
                blocks = Blocks(file, self.files.is_local)
                for _, (offset, size) in group:
                    try:
                        yield decode(blocks.at(int(offset), int(size)))
                    except Exception as error:
                        yield error


@lru_cache(maxsize=8)
def _index(source: WebDatasetSource, name: str) -> dict[str, tuple[int, int]]:
    """Offset and length of every image of a tar; kept for as long as the source is used."""
    shard = source._shard(name)
    return {stem: (image.offset, image.size) for stem, image in zip(shard.stems, shard.images, strict=True)}


def _split_key(key: str) -> tuple[str, str]:
    name, _, stem = key.partition(f"{SUFFIX}/")
    return name + SUFFIX, stem


def _samples(found: Iterator[Member], where: str) -> dict[str, dict[str, Member]]:
    """stem -> suffix -> file. The suffix begins at the first dot of the name, as in WebDataset."""
    samples: dict[str, dict[str, Member]] = {}
    for member in found:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, kind = name.partition(".")
        if not stem or not dot:  # hidden, or the __key__ of nothing
            continue
        parts = samples.setdefault(f"{folder}{slash}{stem}", {})
        if kind.lower() in parts:
            raise ValueError(
                f"images.path: {where}: found {member.name} twice, expected each name once; write the tar anew"
            )
        parts[kind.lower()] = member
    return samples
