"""Turn labels of any spelling into class numbers and class names, and find the columns that hold them."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydit.errors import InvalidInput

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "class_name", "category", "target")
"""Columns that are taken for labels if images.label_column is not set; the first that exists."""
MAX_CLASSES = 1_000_000
CORRECT_LABELS = "correct the labels, and leave out images without one"


def number_labels(
    labels: pa.ChunkedArray, known: Sequence[str], where: str, order: str | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers, int32 (N,), and class names for a column of numbers or names.

    known: class names in the order of their numbers. If it is empty, numbers are their own names, and names are
    numbered in sorted order. order: "numeric" to sort names by value where all are numbers, and to number the numbers
    that occur, in order, instead of all from 0. Raises InvalidInput, naming `where`, if a label is missing, unknown, or
    neither an integer nor a name.
    """
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    is_name = pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)
    if not is_name and not pa.types.is_integer(labels.type) or labels.null_count:
        found = "no label" if labels.null_count else f"the label {labels[0].as_py()!r} of type {labels.type}"
        raise InvalidInput(
            f"images.path: {where}: found {found}", "integers from 0 or class names in every row", CORRECT_LABELS
        )
    number = _number_names if is_name else _number_numbers
    return number(labels, known, where, order == "numeric")


def _number_numbers(
    labels: pa.ChunkedArray, known: Sequence[str], where: str, numeric: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    numbers = labels.to_numpy()
    end = len(known) or MAX_CLASSES
    wrong = numbers[(numbers < 0) | (numbers >= end)]
    if len(wrong):
        raise InvalidInput(
            f"images.path: {where}: found the label {wrong[0]}", f"integers from 0 to {end - 1:,}", CORRECT_LABELS
        )
    if numeric and not known:
        occurring, labels_of = np.unique(numbers, return_inverse=True)
        return labels_of.astype(np.int32), tuple(map(str, occurring.tolist()))
    names = tuple(known) or tuple(str(number) for number in range(int(numbers.max(initial=-1)) + 1))
    return numbers.astype(np.int32), names


def _number_names(
    labels: pa.ChunkedArray, known: Sequence[str], where: str, numeric: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    found = pc.unique(labels).to_pylist()
    by_value = numeric and are_numbers(found)
    names = tuple(known) or tuple(sorted(found, key=lambda name: (int(name), name)) if by_value else sorted(found))
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise InvalidInput(
            f"images.path: {where}: found the class {unknown[0]!r}",
            f"one of {_shorten(names)}",
            "add it to images.class_names, or leave images.class_names out",
        )
    return pc.index_in(labels, pa.array(names, labels.type)).to_numpy().astype(np.int32), names


def are_numbers(names: Sequence[str]) -> bool:
    """Return whether all class names are decimal numbers."""
    return all(name.isascii() and name.isdecimal() for name in names)


def parse_labels(texts: list[str]) -> pa.ChunkedArray:
    """Return labels that were stored as text as integers if all of them are numbers, else as strings."""
    try:
        return pa.chunked_array([pa.array([int(text) for text in texts], pa.int64())])
    except (ValueError, OverflowError):
        return pa.chunked_array([pa.array(texts, pa.string())])


def huggingface_features(metadata: dict | None) -> dict[str, dict]:
    """Return what Hugging Face's `datasets` records about each column in the metadata of an Arrow schema."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    return {name: feature for name, feature in info.get("features", {}).items() if isinstance(feature, dict)}


def recorded_class_names(metadata: dict | None, column: str | None) -> tuple[str, ...]:
    """Return the class names that the metadata of an Arrow schema records for a ClassLabel column; empty if none."""
    return tuple(huggingface_features(metadata).get(column or "", {}).get("names", ()))


def choose_column(names: Sequence[str], chosen: str | None, usual: Sequence[str], field: str, where: str) -> str | None:
    """Return the chosen column, or without a choice the first usual one that exists, or None.

    field: the recipe's field of the choice. Raises InvalidInput if the chosen column does not exist.
    """
    if chosen is None:
        return next((name for name in usual if name in names), None)
    if chosen not in names:
        raise InvalidInput(
            f"images.{field}: found {chosen!r}",
            f"one of the columns of {where}: {', '.join(names)}",
            f"correct images.{field}",
        )
    return chosen


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
