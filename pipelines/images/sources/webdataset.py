"""WebDataset: tar shards, in which files with the same name except for the suffix are one sample."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import is_image, try_decode
from pipelines.images.labels import LABEL_COLUMNS, label_text, number_labels, parse_labels, refuse_missing_labels
from pipelines.images.listing import Listing, Locations
from pipelines.images.source_files import MAX_FILE_BYTES, Files, ImagesPath
from pipelines.images.splits import describe_files, pick_split, refuse_absent_split
from pipelines.images.tar import BLOCK, BlockReader, Member, TarError, read_members
from pipelines.images.tar_samples import Sample, group_samples, join_samples, note_folders
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer
from raydit.regular_files import FileTooLarge, refuse_too_large

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4")
PICKLED = re.compile(rb"\x80[\x02-\x05]|[IF]\d+\n\.\Z|[SV]'?[^\n]*\n(p\d+\n)?\.\Z")
"""Start of a pickle of protocol 2 to 5, or all of a pickled number or text of protocol 0."""
MAX_LABEL_BYTES, MAX_JSON_BYTES = 2**16, 2**24
"""Longest .cls and .json of a sample."""


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a tar file, compressed or not, or a folder with some that are not."""
    if path.name is not None:
        return path.name.endswith((SUFFIX, *COMPRESSED_SUFFIXES))
    return any(name.endswith(SUFFIX) for name in path.names)


def open_shards(path: ImagesPath, config: "ImagesConfig") -> "WebDatasetSource":
    """Open a tar file, or all those in a folder that belong to the wanted split. Raises InvalidInput if compressed."""
    refuse_compressed([path.name] if path.name else [], path.files.root)
    return WebDatasetSource(path.files, config, [path.name] if path.name else None, undivided=path.name)


def refuse_compressed(names: Sequence[str], where: str) -> None:
    """Raise InvalidInput if some files are compressed tars."""
    found = [name for name in names if name.endswith(COMPRESSED_SUFFIXES)]
    if found:
        raise InvalidInput(
            f"images.path: found {describe_compressed(found)} in {where}",
            "uncompressed tar files (.tar), in which an image is read by a seek",
            "decompress them (gunzip, zstd -d): the images in them are compressed already",
        )


def describe_compressed(names: Sequence[str]) -> str:
    """Return how many compressed tar files there are, and the first."""
    return f"the compressed tar {names[0]}" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


class TarShard(NamedTuple):
    """The samples with an image in a tar file, in its order."""

    stems: list[str]
    images: list[Member]
    labels: list[str] | None
    """Labels as text; None if no sample has one."""
    kinds: tuple[str, ...]
    """Suffixes in the first sample besides those of images, if no sample has a label."""
    left_out: list[str]
    """Members with a suffix that cannot be read as files, each with the reason."""


class WebDatasetSource:
    """Tar files of samples `stem.jpg`, `stem.cls`. Keys are TAR/STEM; labels are in `.cls` or in a field of `.json`.

    A listing reads the headers of every tar. Its locations let an image be read by a seek.
    names: the tar files, relative to the root; by default, all under it that belong to the wanted split. notes: those
    of the listing. undivided: as for `ColumnSource`.
    """

    def __init__(
        self,
        files: Files,
        config: "ImagesConfig",
        names: Sequence[str] | None = None,
        notes: tuple[str, ...] = (),
        undivided: str | None = None,
    ):
        self.files, self.config, self.names, self.notes = files, config, names, notes
        self.undivided = undivided

    def listing(self) -> Listing:
        if self.undivided is not None:
            refuse_absent_split(self.config, self.files.root, self.undivided)
        names, notes = self._find_files() if self.names is None else (self.names, self.notes)
        _refuse_tar_folders(names, self.files)
        shards = list(self.files.map_names(self._list_shard, names))
        keys = [f"{name}/{stem}" for name, shard in zip(names, shards, strict=True) for stem in shard.stems]
        images = [image for shard in shards for image in shard.images]
        labels, class_names = self._number_labels(names, shards)
        left_out = [f"{name}/{member}" for name, shard in zip(names, shards, strict=True) for member in shard.left_out]
        if left_out:
            notes = (*notes, f"left out: {len(left_out):,} of the members of tar files, such as {left_out[0]}")
        if not class_names and self.config.reading is None:
            notes = (*notes, *note_folders(stem for shard in shards for stem in shard.stems))
        return Listing(
            keys,
            labels,
            np.array([image.stamp for image in images], np.int64),
            class_names,
            np.array([(image.offset, image.size) for image in images], np.int64),
            notes=notes,
            columns=() if class_names else shards[0].kinds,
            root=self.files.root,
        )

    def _find_files(self) -> tuple[list[str], tuple[str, ...]]:
        """Return the files of the wanted split, and what to say about the others."""
        listed = self.files.list_all()[0]
        names = [name for name in listed if name.endswith(SUFFIX)]
        compressed = [name for name in listed if name.endswith(COMPRESSED_SUFFIXES)]
        if not names:
            refuse_compressed(compressed, self.files.root)
            raise NotFound(
                f"images.path: found no tar files in {self.files.root}",
                f"files ending in {SUFFIX}",
                "correct images.path, or set images.format",
            )
        earlier = self.config.reading is not None
        picked = pick_split(names, self.config.split, self.files.root, earlier=earlier)
        notes = describe_files(names, picked, self.config.split)
        if compressed:
            notes = (*notes, f"left out: {describe_compressed(compressed)}")
        return picked, notes

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
            if shard.labels is not None and self.config.reading is None:
                stems = shard.stems
                refuse_missing_labels(pa.chunked_array([shard.labels]), stems.__getitem__, self.files.path(name))
            texts += shard.labels or []
        if shards[0].labels is None:
            return np.zeros(sum(len(shard.stems) for shard in shards), np.int32), ()
        return number_labels(
            parse_labels(texts, self.config.class_names, earlier=self.config.reading is not None),
            self.config.class_names,
            f"labels in {self.files.root}",
            self.config.class_order,
        )

    def _list_shard(self, name: str) -> TarShard:
        where = self.files.path(name)
        with self.files.open(name) as file:
            blocks = BlockReader(file, self.files.is_local)
            refuse_lfs_pointer(blocks.read(0, BLOCK), f"images.path: {where}", "the tar file")
            left_out: list[str] = []
            try:
                members = read_members(blocks, earlier=self.config.reading is not None)
                samples = group_samples(members, where, left_out)
            except TarError as error:
                raise InvalidInput(f"images.path: {where}: {error.found}", error.expected, error.do) from error
            chosen = {stem: self._choose_image(sample, stem, where) for stem, sample in samples.items()}
            images = {stem: image for stem, image in chosen.items() if image is not None}
            if self.config.reading is None:
                join_samples(samples, images)
            if not images:
                found = ", ".join(sorted({kind for sample in samples.values() for kind in sample})[:10])
                found = found or ", ".join(left_out[:3]) or "nothing"
                raise InvalidInput(
                    f"images.path: {where}: found no images but {found}",
                    "samples such as 0001.jpg and 0001.cls",
                    "remove the tar, or set images.image_column to the suffix of the images",
                )
            labels = {stem: self._read_label(samples[stem], blocks, f"{where}, sample {stem}") for stem in images}
        missing = next((stem for stem, label in labels.items() if label is None), None)
        if missing is None:
            earlier = self.config.reading is not None
            texts = [label_text(label, where, earlier=earlier) for label in labels.values()]
            return TarShard(list(images), list(images.values()), texts, (), left_out)
        if any(label is not None for label in labels.values()):
            raise InvalidInput(
                f"images.path: {where}: found the sample {missing} without a label among others with one",
                "a label in every sample or in none",
                "write the tar again",
            )
        first = samples[next(iter(images))]
        kinds = tuple(kind for kind in first if not is_image(f".{kind}"))
        return TarShard(list(images), list(images.values()), None, kinds, left_out)

    def _choose_image(self, sample: Sample, stem: str, where: str) -> Member | None:
        if self.config.image_column is not None:
            return sample.get(self.config.image_column)
        kinds = [kind for kind in sample if is_image(f".{kind}", earlier=True)]
        if not kinds and self.config.reading is None:
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
            return self._parse_label(_read_bounded(blocks, member, MAX_LABEL_BYTES, where), member.name, where)
        if "json" not in sample:
            return None
        member = sample["json"]
        try:
            fields = json.loads(_read_bounded(blocks, member, MAX_JSON_BYTES, where))
        except FileTooLarge:
            raise
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"images.path: {where}: found {error} in its .json", "JSON", "correct the file"
            ) from error
        usual = (column,) if column is not None else LABEL_COLUMNS
        return next((fields[name] for name in usual if isinstance(fields, dict) and name in fields), None)

    def _parse_label(self, data: bytes, name: str, where: str) -> str:
        """Return the text of a label's file. Raises InvalidInput if it is pickled or no text."""
        if self.config.reading is None and (found := _describe_binary_label(data)):
            raise InvalidInput(
                f"images.path: {where}: found {found} in {name}",
                "an integer or a class name as text",
                "write the labels as text: loading a pickle can run code, so none is loaded",
            )
        return data.decode(errors="replace").strip()

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        named = [_split_key(key) for key in keys]
        if locations is None:
            versions = {name: self.files.version(name) for name in dict(named)}  # a request for each tar, not image
            locations = [_index_shard(self, name, versions[name])[stem] for name, stem in named]
        pairs = zip((name for name, _ in named), locations, strict=True)
        for name, group in groupby(pairs, key=lambda pair: pair[0]):
            with self.files.open(name) as file:
                blocks = BlockReader(file, self.files.is_local)
                yield from (_read_image(blocks, int(offset), int(size)) for _, (offset, size) in group)


def _read_image(blocks: BlockReader, offset: int, size: int) -> "Image.Image | Exception":
    """Return an image, or why it cannot be used. Errors of the disk or network are raised: the image may be intact."""
    try:
        refuse_too_large(size, MAX_FILE_BYTES, "the file")
    except FileTooLarge as error:
        return error
    return try_decode(blocks.read(offset, size))


def _read_bounded(blocks: BlockReader, member: Member, max_bytes: int, where: str) -> bytes:
    """Return the content of a small file. Raises FileTooLarge if it is longer than `max_bytes`."""
    refuse_too_large(member.size, max_bytes, f"images.path: {where}: {member.name}")
    return blocks.read(member.offset, member.size)


def _describe_binary_label(data: bytes) -> str:
    """Return in words what the content of a label's file is if it is no text; empty if it is text."""
    if PICKLED.match(data):
        return "a pickled label"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "a label that is not UTF-8"
    return ""


@lru_cache(maxsize=8)
def _index_shard(
    source: WebDatasetSource, name: str, version: tuple[int | None, int | None]
) -> dict[str, tuple[int, int]]:
    """Return offset and length of every image of a tar by its stem; cached, because a source is read many times.

    version: the file's (see `Files.version`).
    """
    shard = source._list_shard(name)
    return {stem: (image.offset, image.size) for stem, image in zip(shard.stems, shard.images, strict=True)}


def _split_key(key: str) -> tuple[str, str]:
    """Split a key TAR/STEM."""
    name, _, stem = key.partition(f"{SUFFIX}/")
    return name + SUFFIX, stem


def _refuse_tar_folders(names: Sequence[str], files: Files) -> None:
    """Raise InvalidInput if a tar lies in a folder whose name ends as a tar's, at which its keys would be split."""
    for name in names:
        if f"{SUFFIX}/" in name:
            raise InvalidInput(
                f"images.path: found {files.path(name)}, in a folder whose name ends in {SUFFIX}",
                "folders of other names",
                "rename the folder, or set images.path to it",
            )
