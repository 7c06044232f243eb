"""Find which split of a data set (train, validation, test) a file or folder belongs to, by the words in its name."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.images.listing import shorten_list
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig

MAIN_SPLITS = ("train", "validation", "test")
SPLIT_OF_WORD = {"train": "train", "training": "train"}
SPLIT_OF_WORD |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLIT_OF_WORD |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
"""Split of each word that named one before `FURTHER_WORDS` did."""
FURTHER_WORDS = dict.fromkeys(("validate", "devel", "development", "holdout", "heldout"), "validation")
FURTHER_WORDS |= dict.fromkeys(("unlabelled", "unlabeled", "unsup", "unsupervised"), "unlabelled") | {"extra": "extra"}
NEUTRAL_WORDS = {"set", "sets", "data", "dataset", "split", "part", "subset", "folder", "files", "samples", "examples"}
NEUTRAL_WORDS |= {
    "image",
    "images",
    "img",
    "imgs",
    "photos",
    "pictures",
    "pics",
    "jpg",
    "jpeg",
    "png",
    "batch",
    "batches",
}
"""Words that a split's name may hold besides, also without a separator, such as test_images and trainset."""
ALL_SPLITS = "all"
DEFAULT_SPLIT = "train"
IS_DEFAULT = " (the default)"
"""Addition to an error about a split that the recipe may not have set explicitly."""


def split_of(name: str, *, earlier: bool = False) -> str | None:
    """Return the split that a path names, or None. The deepest folder or file name wins, as on the Hugging Face hub.

    A word ends where letters end: "data/train-00000-of-00005.parquet" is train, "training_val.tar" validation.
    earlier: know the words of SPLIT_OF_WORD alone (images.reading).
    """
    stem = name.rpartition(".")[0].lower() or name.lower()
    words = re.findall(r"[a-z]+", stem)
    found = next((SPLIT_OF_WORD[word] for word in reversed(words) if word in SPLIT_OF_WORD), None)
    if found or earlier:
        return found
    words = re.findall(r"[a-z]+", _join_held_out(stem))
    return next((split for word in reversed(words) if (split := split_of_word(word))), None)


def split_of_word(word: str) -> str | None:
    """Return the split of a word in lower case, to which a neutral word may be joined: test, testset, imagestest."""
    known = SPLIT_OF_WORD | FURTHER_WORDS
    if word in known:
        return known[word]
    for neutral in NEUTRAL_WORDS:
        for rest in (word.removesuffix(neutral), word.removeprefix(neutral)):
            if rest != word and rest in known:
                return known[rest]
    return None


def canonical_split(name: str) -> str:
    """Return the split that a recipe or a card means by a name: "train" for "Training"; unknown names as they are."""
    split, rest = _analyse(name)
    return name if split is None or rest else split


def splits_of_folders(folders: Collection[str]) -> dict[str, str | None]:
    """Return the split that each of some neighbouring folders names, or None; case, digits and separators are ignored.

    A name counts that holds nothing else but neutral words (Training, test_images, val2017), and so do names that have
    the same rest (seg_train beside seg_test).
    """
    analysed = {folder: _analyse(folder) for folder in folders}
    by_rest: dict[tuple[str, ...], set[str]] = {}
    for split, rest in analysed.values():
        if split:
            by_rest.setdefault(rest, set()).add(split)
    shared = {rest for rest, splits in by_rest.items() if not rest or ("train" in splits and len(splits) > 1)}
    return {folder: split if rest in shared else None for folder, (split, rest) in analysed.items()}


def _analyse(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that exactly one word of a name stands for, or None, and the words that mean something else."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", _join_held_out(parted.lower()))
    splits = {split for word in words if (split := split_of_word(word))}
    rest = tuple(word for word in words if not split_of_word(word) and word not in NEUTRAL_WORDS)
    return (splits.pop() if len(splits) == 1 else None), rest


def _join_held_out(text: str) -> str:
    return re.sub(r"\b(held|hold)[-_ ]out(?![a-z])", "heldout", text)


class SplitLayout(NamedTuple):
    """Where the folders of the splits and of the classes are in the paths of images."""

    level: int
    """Position in a path of the folder that names the split."""
    label_level: int
    """Position of the folder that names the class."""
    splits: dict[str, str | None]
    """Split of each folder at `level`; None for one that belongs to none."""

    def have_class_folders(self, keys: Sequence[str]) -> bool:
        """Return whether all images lie in class folders, also those beside the splits' folders."""
        return all(key.count("/") > self.label_level for key in keys)


def find_split_layout(keys: Sequence[str]) -> SplitLayout | None:
    """Return where the split folders of images are, at the top or one level below, or None if there are none."""
    if not all("/" in key for key in keys):
        return None
    tops = {key.partition("/")[0] for key in keys}
    if splits := _folders_as_splits(tops, keys, 0):
        return SplitLayout(0, 1, splits)
    if not all(key.count("/") > 1 for key in keys):
        return None
    splits = _folders_as_splits({key.split("/", 2)[1] for key in keys}, keys, 1)
    # Below a single folder, such as an archive's, come splits of classes; below several, splits of each class.
    return SplitLayout(1, 2 if len(tops) == 1 else 0, splits) if splits else None


def as_splits(names: Collection[str]) -> dict[str, str | None] | None:
    """Return the split of each name if together they are the splits of a data set, or None.

    All must name splits, training among them, or there must be training and test images, and others are left out.
    """
    splits = splits_of_folders(names)
    found = set(filter(None, splits.values()))
    are_splits = "train" in found and (None not in splits.values() or found & {"test", "validation"})
    return splits if are_splits else None


def _folders_as_splits(folders: Collection[str], keys: Sequence[str], level: int) -> dict[str, str | None] | None:
    """Return the split of each folder at a level if together they are the splits of a data set, or None.

    Beside other folders than those of splits they are only if the others are at most as many, or if their own images
    lie in folders again, as those of no class "test" among other classes do.
    """
    splits = as_splits(folders)
    if splits is None and level == 0 and folders and all(name.lower() in SPLIT_OF_WORD for name in folders):
        return splits_of_folders(folders)  # test images alone, say, are no class; images.split must name them
    named = {name for name, split in (splits or {}).items() if split}
    if splits is None or len(folders) <= 2 * len(named):
        return splits
    inside = (key.split("/", level + 1) for key in keys)
    return splits if all("/" in part[level + 1] for part in inside if part[level] in named) else None


def pick_images(
    groups: Sequence[str], splits: Mapping[str, str | None], split: str, where: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return the positions of the images of a split, and one line about those that it leaves out, if any.

    groups: of each image the folder or value that names its split. splits: what each group is. split: the wanted one,
    by any name; "all" for every group that names one. Raises InvalidInput if no image belongs to it.
    """
    canonical = canonical_split(split)
    wanted = {name for name, found in splits.items() if found and canonical in (found, ALL_SPLITS)}
    if not wanted:
        raise unknown_split(split, set(filter(None, splits.values())), where)
    counts = Counter(groups)
    taken = {name: count for name, count in sorted(counts.items()) if name in wanted}
    left_out = {name: count for name, count in sorted(counts.items()) if name not in wanted}
    notes = (describe_choice(split, taken, left_out, "images"),) if left_out else ()
    return [index for index, group in enumerate(groups) if group in wanted], notes


def pick_split(names: Sequence[str], split: str, where: str, *, earlier: bool = False) -> list[str]:
    """Return the names that belong to a split; all names for "train" if none of them names any split.

    where: the data set, for messages. earlier: as in `split_of`. Raises InvalidInput if there is no such split, and
    NotFound if some of its numbered files are missing.
    """
    wanted = SPLIT_OF_WORD.get(split, split) if earlier else canonical_split(split)
    splits = {name: split_of(name, earlier=earlier) or _split_of_numbered(name) for name in names}
    if split == ALL_SPLITS or (wanted == "train" and not any(found in MAIN_SPLITS for found in splits.values())):
        picked = list(names)
    else:
        picked = [name for name in names if splits[name] in (wanted, split)]
    _check_complete(picked, where)
    if not picked:
        raise unknown_split(split, {found for found in splits.values() if found}, where)
    return picked


def refuse_absent_split(images: "ImagesConfig", where: str, name: str = "") -> None:
    """Raise InvalidInput if `images.split` is neither "train" nor "all" and the images are not divided into splits.

    where: the images, for messages. name: of their file, or of the split that they were saved from: images in
    "test.parquet" are the split "test". Outputs that were made before this check stay usable (`images.reading`).
    """
    if images.reading is not None or images.split == name:
        return
    if canonical_split(images.split) not in ("train", ALL_SPLITS, split_of(name)):
        raise unknown_split(images.split, {found} if (found := split_of(name)) else (), where)


def unknown_split(split: str, known: Collection[str], where: str) -> InvalidInput:
    """Return the error for a split that a data set does not have. known: those that it has."""
    return InvalidInput(
        f"images.split: found {describe_wanted(split)}",
        f"one of the splits of {where}: {', '.join(sorted(known)) or 'no splits'}",
        f'set images.split to one of them, or to "{ALL_SPLITS}"',
    )


def describe_wanted(split: str) -> str:
    """Return the wanted split for an error, which says so if the split is what a recipe that names none asks for."""
    return f"{split!r}{IS_DEFAULT if split == DEFAULT_SPLIT else ''}"


def describe_choice(split: str, taken: Mapping[str, int], left_out: Mapping[str, int], unit: str) -> str:
    """Return one line about a split that was taken.

    taken, left_out: numbers by folder or split. unit: what they count, such as "images".
    """

    def shown(counts: Mapping[str, int]) -> str:
        return shorten_list([f"{name} ({count:,})" for name, count in counts.items()], 6)

    taken_split = canonical_split(split)
    return f'the split "{taken_split}" is used: {shown(taken)} {unit}; left out: {shown(left_out)} {unit}'


def describe_files(names: Sequence[str], picked: Sequence[str], split: str) -> tuple[str, ...]:
    """Return one line about the files that a split leaves out; none if it leaves out none. names: of all splits."""
    used = set(picked)
    taken, left_out = Counter[str](), Counter[str]()
    for name in names:
        counts = taken if name in used else left_out
        counts[split_of(name) or _split_of_numbered(name) or name] += 1
    return (describe_choice(split, taken, left_out, "files"),) if left_out else ()


def describe_subset(names: Sequence[str], inside: Sequence[str], subset: str) -> tuple[str, ...]:
    """Return one line about the files that are not in a subset, by their folders; none if all are.

    names: all files. inside: those of the subset, whatever their split.
    """
    used = set(inside)
    left_out = Counter(name.rpartition("/")[0] or name for name in names if name not in used)
    if not left_out:
        return ()
    shown = shorten_list([f"{name} ({count:,})" for name, count in left_out.items()], 6)
    return (f'the subset "{subset}" is used, which leaves out: {shown} files',)


def _check_complete(names: Sequence[str], where: str) -> None:
    """Raise NotFound if a file of a numbered series "-00000-of-00005" is missing.

    Otherwise, a copy that was interrupted would look like a smaller data set.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        if len(numbers) < count:
            raise NotFound(
                f"images.path: found {len(numbers)} of {count} files {stem}-*-of-{count:05d} in {where}",
                "all of them",
                "copy the missing ones",
            )


def _split_of_numbered(name: str) -> str | None:
    """Return the split that a numbered file names by another word, such as "data/other-00000-of-00002.parquet"."""
    match = re.fullmatch(r"(.+)-\d+-of-\d+\.\w+", name.rpartition("/")[2], re.DOTALL)
    return match[1] if match else None
