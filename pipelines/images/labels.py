"""Turn labels of any spelling into class numbers and class names, and find the columns that hold them."""

import json
import math
import reprlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.listing import shorten_list
from raydit.errors import InvalidInput

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "class_name", "category", "target")
"""Columns that are taken for labels if images.label_column is not set; the first that exists."""
MAX_CLASSES = 1_000_000
CORRECT_LABELS = "correct the labels, and leave out images without one"


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts, as strings of any kind or as a dictionary of them."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def decode_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return texts as strings or large strings, of which Arrow has all functions; other columns as they are."""
    if not is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):  # by hand, because Arrow decodes no dictionary of string views
        chunks = [chunk.dictionary.cast(pa.large_string()).take(chunk.indices) for chunk in column.chunks]
        return pa.chunked_array(chunks, pa.large_string())
    return column.cast(pa.large_string()) if pa.types.is_string_view(column.type) else column


def number_labels(
    labels: pa.ChunkedArray, known: Sequence[str], where: str, order: str | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers, int32 (N,), and class names for a column of numbers or names.

    known: class names in the order of their numbers. If it is empty, numbers are their own names, and names are
    numbered in sorted order. order: "numeric" to sort names by value where all are numbers, and to number the numbers
    that occur, in order, instead of all from 0. Raises InvalidInput, naming `where`, if a label is missing, unknown, or
    neither an integer nor a name.
    """
    labels = decode_texts(labels)
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    labels = _whole_numbers(labels)
    is_name = pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)
    if not is_name and not pa.types.is_integer(labels.type) or labels.null_count:
        shown = f"the label {_show_wrong(labels)} of type {str(labels.type)[:100]}" if len(labels) else ""
        found = "no label" if labels.null_count else shown or f"labels of type {str(labels.type)[:100]}"
        raise InvalidInput(
            f"images.path: {where}: found {found}", "integers from 0 or class names in every row", CORRECT_LABELS
        )
    number = _number_names if is_name else _number_numbers
    return number(labels, known, where, order == "numeric")


def _show_wrong(labels: pa.ChunkedArray) -> str:
    """Return the first label, or the first fraction among floating-point ones, as text."""
    wrong = labels[0].as_py()
    if pa.types.is_floating(labels.type):
        wrong = next((label for label in labels.to_pylist() if label is not None and label % 1 != 0), wrong)
    return reprlib.repr(wrong)


def _whole_numbers(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return floating-point labels as integers if all of them are whole, as tools write integers beside gaps."""
    if not pa.types.is_floating(labels.type) or labels.null_count:
        return labels
    try:
        return labels.cast(pa.int64())  # a safe cast, which refuses fractions, NaN and infinity
    except pa.ArrowInvalid:
        return labels


def refuse_missing_labels(labels: pa.ChunkedArray, key_of: Callable[[int], str], where: str) -> None:
    """Raise InvalidInput, naming the first image, if a label is null or an empty text, which is no class.

    key_of: returns the name of the image at a position.
    """
    labels = decode_texts(labels)
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    missing = pc.is_null(labels)
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(labels), ""), True))
    if count := pc.sum(missing).as_py():
        first = key_of(pc.index(missing, True).as_py())
        further = f" and {count - 1:,} more" if count > 1 else ""
        raise InvalidInput(
            f"images.path: {where}: found no label",
            "integers from 0 or class names in every row",
            f"{CORRECT_LABELS}: {first}{further}",
        )


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
    names = tuple(known) or tuple(str(number) for number in range(int(numbers.max()) + 1 if len(numbers) else 0))
    return numbers.astype(np.int32), names


def _number_names(
    labels: pa.ChunkedArray, known: Sequence[str], where: str, numeric: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    found = pc.unique(labels).to_pylist()
    by_value = numeric and are_numbers(found)
    names = tuple(known) or tuple(sorted(found, key=lambda name: (int(name), name)) if by_value else sorted(found))
    repeated = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
    if repeated is not None:
        raise InvalidInput(
            f"images.class_names: found {repeated!r} more than once, and {where} name their classes",
            "different names",
            "remove one of them",
        )
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise InvalidInput(
            f"images.path: {where}: found the class {unknown[0]!r}",
            f"one of {shorten_list(names)}",
            "add it to images.class_names, or leave images.class_names out",
        )
    return pc.index_in(labels, pa.array(names, labels.type)).to_numpy().astype(np.int32), names


def are_numbers(names: Sequence[str]) -> bool:
    """Return whether all class names are decimal numbers."""
    return all(name.isascii() and name.isdecimal() for name in names)


def label_text(value: object, where: str, *, earlier: bool = False) -> str:
    """Return a label of a JSON file as text; a whole number such as 3.0 as an integer.

    earlier: take any value as Python writes it (images.reading). Raises InvalidInput, naming `where`, for a list, an
    object, a truth value or a number that is not finite, as which tools write a missing label, and for text that is not
    Unicode: JSON may escape half of a pair of surrogates.
    """
    if isinstance(value, float) and value.is_integer() and not earlier:
        value = int(value)
    is_wrong = isinstance(value, (list, dict, bool)) or (isinstance(value, float) and not math.isfinite(value))
    is_name = earlier or not is_wrong
    if not is_name or not is_unicode(str(value)):
        raise InvalidInput(
            f"images.path: {where}: found the label {reprlib.repr(value)}", "an integer or a class name", CORRECT_LABELS
        )
    return str(value)


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded, which one with half of a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_labels(texts: list[str], known: Sequence[str] = (), *, earlier: bool = False) -> pa.ChunkedArray:
    """Return labels that were stored as text as integers if `parse_numbers` does, else as strings.

    known: images.class_names. earlier: take all that Python does for numbers (images.reading), such as "1_2" for 12.
    """
    if earlier:
        try:
            return pa.chunked_array([pa.array([int(text) for text in texts], pa.int64())])
        except (ValueError, OverflowError):
            pass
    return parse_numbers(pa.chunked_array([pa.array(texts, pa.string())]), known)


def parse_numbers(texts: pa.ChunkedArray, known: Sequence[str] = ()) -> pa.ChunkedArray:
    """Return labels as integers if each is written as Python writes its number, such as "7"; else unchanged.

    Other spellings, such as "007" or "1e3", are names: two of them may be the same number. With class names that are
    known, of which the labels are none, decimals such as "007" are numbers. texts: strings, or null for missing labels.
    """
    pattern = "^(0|-?[1-9][0-9]*)$"
    if known and not pc.any(pc.is_in(texts, pa.array(known, texts.type))).as_py():
        pattern = "^[+-]?[0-9]+$"
    if not pc.all(pc.match_substring_regex(texts, pattern), min_count=0).as_py():
        return texts
    try:
        return pc.utf8_ltrim(texts, "+").cast(pa.int64())
    except pa.ArrowInvalid:
        return texts  # numbers of more digits than those of any class are names


def huggingface_features(metadata: dict | None) -> dict[str, dict]:
    """Return what Hugging Face's `datasets` records about each column in the metadata of an Arrow schema."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (AttributeError, RecursionError, ValueError) as error:
        raise InvalidInput(
            f"images.path: found no description of columns in a schema's metadata ({type(error).__name__})",
            "what Hugging Face's datasets writes",
            "write the file again",
        ) from error


def recorded_class_names(metadata: dict | None, column: str | None) -> tuple[str, ...]:
    """Return the class names that the metadata of an Arrow schema records for a ClassLabel column; empty if none."""
    names = huggingface_features(metadata).get(column or "", {}).get("names") or ()
    found = tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else ()
    if wrong := [name for name in found if not is_unicode(name)]:
        raise InvalidInput(
            f"images.path: found the class name {wrong[0]!r} in a schema's metadata", "Unicode", "write the file again"
        )
    return found


def class_label_columns(metadata: dict | None) -> list[str]:
    """Return the columns that the metadata of an Arrow schema declares as class labels."""
    features = huggingface_features(metadata)
    return [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]


def choose_label_column(
    names: Sequence[str], chosen: str | None, declared: Sequence[str], where: str, usual: Sequence[str] = LABEL_COLUMNS
) -> str | None:
    """Return the chosen column of labels, else the first usual one, else the only one that is declared as such.

    declared: columns that the data set declares as class labels. Raises InvalidInput if the chosen column does not
    exist, or if several are declared and none has a usual name.
    """
    column = choose_column(names, chosen, usual, "label_column", where)
    declared = [name for name in dict.fromkeys(declared) if name in names]
    if column is not None or not declared:
        return column
    if len(declared) > 1:
        raise InvalidInput(
            f"images.path: {where}: found the class labels {shorten_list(declared)}",
            "one column of class labels",
            "set images.label_column to one of them",
        )
    return _require_single(declared[0], names, where)


def choose_column(names: Sequence[str], chosen: str | None, usual: Sequence[str], field: str, where: str) -> str | None:
    """Return the chosen column, or without a choice the first usual one that exists, or None.

    field: the recipe's field of the choice. Raises InvalidInput if the chosen column does not exist, and for a column
    whose name others have as well.
    """
    column = next((name for name in usual if name in names), None) if chosen is None else chosen
    if column is None:
        return None
    if column not in names:
        raise InvalidInput(
            f"images.{field}: found {chosen!r}",
            f"one of the columns of {where}: {', '.join(names)}",
            f"correct images.{field}",
        )
    return _require_single(column, names, where)


def _require_single(column: str, names: Sequence[str], where: str) -> str:
    """Return a column. Raises InvalidInput if several of the columns `names` have its name."""
    if (count := names.count(column)) > 1:
        raise InvalidInput(
            f"images.path: {where}: found {count} columns named {column!r}", "one", "rename or remove the others"
        )
    return column
