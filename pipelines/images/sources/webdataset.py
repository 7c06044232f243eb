"""WebDataset: tar shards, in which files with the same name except for the suffix are one sample."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipelines.images.decoding import decode_image, is_image
from pipelines.images.files import Files, ImagesPath
from pipelines.images.labels import LABEL_COLUMNS, number_labels, parse_labels
from pipelines.images.listing import Listing, Locations
from pipelines.images.splits import pick_split
from pipelines.images.tar import BlockReader, Member, TarError, read_members
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

SUFFIX = ".tar"
Sample = dict[str, Member]
"""Files of one sample by their suffixes, in lower case and without the first dot."""


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a tar file, or a folder with some."""
    return any(name.endswith(SUFFIX) for name in ([path.name] if path.name else path.names))


def open_shards(path: ImagesPath, config: "ImagesConfig") -> "WebDatasetSource":
    """Open a tar file, or all those in a folder that belong to the wanted split."""
    return WebDatasetSource(path.files, config, [path.name] if path.name else None)


class TarShard(NamedTuple):
    """The samples with an image in a tar file, in its order."""

    stems: list[str]
    images: list[Member]
    labels: list[str] | None
    """As text; None if no sample has a label."""


class WebDatasetSource:
    """Tar files of samples `stem.jpg`, `stem.cls`. Keys are TAR/STEM; labels are in `.cls` or in a field of `.json`.

    A listing reads the headers of every tar. Its locations let an image be read by a seek.
    names: the tar files, relative to the root; by default, all under it that belong to the wanted split.
    """

    def __init__(self, files: Files, config: "ImagesConfig", names: Sequence[str] | None = None):
        self.files, self.config, self.names = files, config, names

    def listing(self) -> Listing:
        names = self._find_files() if self.names is None else self.names
        shards = list(self.files.map_names(self._list_shard, names))
        keys = [f"{name}/{stem}" for name, shard in zip(names, shards, strict=True) for stem in shard.stems]
        images = [image for shard in shards for image in shard.images]
        labels, class_names = self._number_labels(names, shards)
        return Listing(
            keys,
            labels,
            np.array([image.stamp for image in images], np.int64),
            class_names,
            np.array([(image.offset, image.size) for image in images], np.int64),
        )

    def _find_files(self) -> list[str]:
        names = [name for name in self.files.list_all()[0] if name.endswith(SUFFIX)]
        if not names:
            raise NotFound(
                f"images.path: found no tar files in {self.files.root}",
                f"files ending in {SUFFIX}",
                "correct images.path, or set images.format",
            )
        return pick_split(names, self.config.split, self.files.root)

    def _number_labels(self, names: Sequence[str], shards: list[TarShard]) -> tuple[np.ndarray, tuple[str, ...]]:
        texts: list[str] = []
        for name, shard in zip(names, shards, strict=True):
            if (shard.labels is None) != (shards[0].labels is None):
                raise InvalidInput(
                    f"images.path: {self.files.path(name)} and {self.files.path(names[0])}: found labels in one and "
                    "none in the other",
                    "them in every tar or in none",
                    "write one of the files again",
                )
            texts += shard.labels or []
        if shards[0].labels is None:
            return np.zeros(sum(len(shard.stems) for shard in shards), np.int32), ()
        return number_labels(
            parse_labels(texts), self.config.class_names, f"labels in {self.files.root}", self.config.class_order
        )

    def _list_shard(self, name: str) -> TarShard:
        where = self.files.path(name)
        with self.files.open(name) as file:
            blocks = BlockReader(file, self.files.is_local)
            try:
                samples = _group_samples(read_members(blocks), where)
            except TarError as error:
                raise InvalidInput(f"images.path: {where}: {error.found}", error.expected, error.do) from error
            chosen = {stem: self._choose_image(sample, stem, where) for stem, sample in samples.items()}
            images = {stem: image for stem, image in chosen.items() if image is not None}
            if not images:
                found = ", ".join(sorted({kind for sample in samples.values() for kind in sample})[:10]) or "nothing"
                raise InvalidInput(
                    f"images.path: {where}: found no images but {found}",
                    "samples such as 0001.jpg and 0001.cls",
                    "remove the tar, or set images.image_column to the suffix of the images",
                )
            labels = {stem: self._read_label(samples[stem], blocks, f"{where}, sample {stem}") for stem in images}
        missing = next((stem for stem, label in labels.items() if label is None), None)
        if missing is None:
            return TarShard(list(images), list(images.values()), [str(label) for label in labels.values()])
        if any(label is not None for label in labels.values()):
            raise InvalidInput(
                f"images.path: {where}: found the sample {missing} without a label among others with one",
                "a label in every sample or in none",
                "write the tar again",
            )
        return TarShard(list(images), list(images.values()), None)

    def _choose_image(self, sample: Sample, stem: str, where: str) -> Member | None:
        if self.config.image_column is not None:
            return sample.get(self.config.image_column)
        kinds = [kind for kind in sample if is_image(f".{kind}")]
        kinds = [kind for kind in kinds if "." not in kind] or kinds  # a.jpg is the image, a.mask.png belongs to it
        if len(kinds) > 1:
            raise InvalidInput(
                f"images.path: {where}: found {len(kinds)} images in the sample {stem} ({', '.join(kinds)})",
                "one",
                "set images.image_column to the suffix of one of them",
            )
        return sample[kinds[0]] if kinds else None

    def _read_label(self, sample: Sample, blocks: BlockReader, where: str) -> object | None:
        """Return the label of a sample: the text of .cls, or a field of .json; None if it has no label."""
        column = self.config.label_column
        if column in sample or (column is None and "cls" in sample):
            member = sample[column or "cls"]
            return blocks.read(member.offset, member.size).decode(errors="replace").strip()
        if "json" not in sample:
            return None
        member = sample["json"]
        try:
            fields = json.loads(blocks.read(member.offset, member.size))
        except ValueError as error:
            raise InvalidInput(
                f"images.path: {where}: found {error} in its .json", "JSON", "correct the file"
            ) from error
        usual = (column,) if column is not None else LABEL_COLUMNS
        return next((fields[name] for name in usual if isinstance(fields, dict) and name in fields), None)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        named = [_split_key(key) for key in keys]
        if locations is None:
            locations = [_index_shard(self, name)[stem] for name, stem in named]
        pairs = zip((name for name, _ in named), locations, strict=True)
        for name, group in groupby(pairs, key=lambda pair: pair[0]):
            with self.files.open(name) as file:
                blocks = BlockReader(file, self.files.is_local)
                for _, (offset, size) in group:
                    try:
                        yield decode_image(blocks.read(int(offset), int(size)))
                    except Exception as error:
                        yield error


@lru_cache(maxsize=8)
def _index_shard(source: WebDatasetSource, name: str) -> dict[str, tuple[int, int]]:
    """Return offset and length of every image of a tar by its stem; cached, because a source is read many times."""
    shard = source._list_shard(name)
    return {stem: (image.offset, image.size) for stem, image in zip(shard.stems, shard.images, strict=True)}


def _split_key(key: str) -> tuple[str, str]:
    """Split a key TAR/STEM."""
    name, _, stem = key.partition(f"{SUFFIX}/")
    return name + SUFFIX, stem


def _group_samples(members: Iterator[Member], where: str) -> dict[str, Sample]:
    """Group files into samples by their stem. A suffix begins at the first dot of the name, as in WebDataset."""
    samples: dict[str, Sample] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, kind = name.partition(".")
        if not stem or not dot:  # a hidden file, or one without a suffix
            continue
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        if kind.lower() in sample:
            raise InvalidInput(
                f"images.path: {where}: found {member.name} twice", "each name once", "write the tar again"
            )
        sample[kind.lower()] = member
    return samples
