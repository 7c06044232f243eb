"""The label table of a model for other classes: classes are matched by their names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit.adaptation.draft_weights import Draft, TrainedModel
from dit.imagenet import match_names

TABLES = ("y_embedder.embedding_table.weight", "label_emb.weight")
"""Names of the label table in a DiT and in a U-ViT."""
MAX_LISTED = 5
"""Classes that a note names."""


def adapt_labels(draft: Draft, base: TrainedModel, target: TrainedModel) -> None:
    """Arrange the rows of the label table for the classes of the target.

    A class that the base knows by name keeps its row. A new one starts at the row of the null class, which follows the
    classes; in a base without one, the mean of all rows stands for it.
    """
    name = next((name for name in TABLES if name in draft.weights), None)
    if name is None or not target.config.num_classes:
        return
    matches = match_names(base.class_names, target.class_names)
    table = draft.weights[name]
    rows = arrange_rows(table, matches, base.config.null_class, with_null=target.config.null_class is not None)
    if rows.shape != table.shape or matches != list(range(len(base.class_names))):
        draft.change(name, rows, describe_matches(matches, base.class_names, target.class_names))


def arrange_rows(table: Tensor, matches: Sequence[int | None], null: int | None, *, with_null: bool) -> Tensor:
    """Return the table (M, D) of M classes, and of the null class with `with_null`, from a table (N, D).

    matches: for each class, its row in the table; None for a new one. null: row of the null class, or None.
    """
    null_row = table.mean(0) if null is None else table[null]
    rows = [null_row if match is None else table[match] for match in matches]
    return torch.stack([*rows, null_row] if with_null else rows)


def describe_matches(matches: Sequence[int | None], base: Sequence[str], target: Sequence[str]) -> str:
    """Return in words which classes keep their rows, which are new and which of the base's are dropped."""
    new = [name for name, match in zip(target, matches, strict=True) if match is None]
    dropped = [name for row, name in enumerate(base) if row not in set(matches)]
    parts = [f"{len(target) - len(new)} of {len(target)} classes by name"]
    parts += [f"new, from the null class: {shorten(new)}"] if new else []
    parts += [f"dropped: {shorten(dropped)}"] if dropped else []
    return "; ".join(parts)


def shorten(names: Sequence[str]) -> str:
    """Return names separated by commas, of many only the first."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")
