"""Labels of any spelling -> class numbers and class names."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "class_name", "category", "target")
MOST_CLASSES = 1_000_000


def number_labels(labels: pa.ChunkedArray, known: Sequence[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers (int32) and class names of a column of numbers or names.

    known: class names in the order of their numbers. Without them, numbers are their own names, and names are
    numbered in sorted order. Raises ValueError, naming `where`, for what is neither, is empty, or is not known.
    """
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    is_name = pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)
    if not is_name and not pa.types.is_integer(labels.type) or labels.null_count:
        wrong = "no label" if labels.null_count else f"the label {labels[0].as_py()!r}, a {labels.type}"
        raise ValueError(
            f"images.path: {where}: found {wrong}, expected integers from 0 or class names in every row. Correct the "
            "labels, and leave out images without one"
        )
    return _from_names(labels, known, where) if is_name else _from_numbers(labels, known, where)


def _from_numbers(labels: pa.ChunkedArray, known: Sequence[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    numbers = labels.to_numpy()
    end = len(known) or MOST_CLASSES
    wrong = numbers[(numbers < 0) | (numbers >= end)]
    if len(wrong):
        raise ValueError(
            f"images.path: {where}: found the label {wrong[0]}, expected integers from 0 to {end - 1:,}. Correct the "
            "labels, and leave out images without one"
        )
    names = tuple(known) or tuple(str(number) for number in range(int(numbers.max(initial=-1)) + 1))
    return numbers.astype(np.int32), names


def _from_names(labels: pa.ChunkedArray, known: Sequence[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    found = pc.unique(labels).to_pylist()
    names = tuple(known) or tuple(sorted(found))
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise ValueError(
            f"images.path: {where}: found the class {strangers[0]!r}, expected one of {_few(names)}. Add it to "
            "images.class_names, or leave images.class_names out"
        )
    return pc.index_in(labels, pa.array(names, labels.type)).to_numpy().astype(np.int32), names


def parse_numbers(texts: list[str]) -> pa.ChunkedArray:
    """Labels that were text: numbers if all of them are, else names."""
    try:
        return pa.chunked_array([pa.array([int(text) for text in texts], pa.int64())])
    except (ValueError, OverflowError):
        return pa.chunked_array([pa.array(texts, pa.string())])


def features_of(metadata: dict | None) -> dict[str, dict]:
    """What Hugging Face's data sets say of their columns, from the metadata of a schema."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    return {name: feature for name, feature in info.get("features", {}).items() if isinstance(feature, dict)}


def class_names_of(metadata: dict | None, column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel column; empty for another."""
    return tuple(features_of(metadata).get(column or "", {}).get("names", ()))


def choose_column(names: Sequence[str], chosen: str | None, usual: Sequence[str], field: str, where: str) -> str | None:
    """The chosen column, or the first of the usual ones that is there. Raises ValueError if the chosen one is not."""
    if chosen is None:
        return next((name for name in usual if name in names), None)
    if chosen not in names:
        raise ValueError(
            f"images.{field}: found {chosen!r}, expected one of the columns of {where}: {', '.join(names)}"
        )
    return chosen


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
