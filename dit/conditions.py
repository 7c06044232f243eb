"""What a model is conditioned on beside the timestep: class labels, text, sizes, guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from raydit.errors import InvalidInput

NUM_DIMENSIONS = {"labels": 1, "text": 3, "text_mask": 2, "pooled": 2, "size": 2, "guidance": 1}
"""Dimensions of each field of `Conditions`; the first is the image."""


@dataclass(frozen=True, eq=False)  # comparing tensors gives no truth value
class Conditions:
    """The conditions of N images. Every field is optional; which ones there are is a matter of the model.

    Raises InvalidInput if the number of dimensions of a field is wrong, if fields are of different numbers of images,
    or if text does not fit its mask.
    """

    labels: Tensor | None = None
    """(N,) int64 classes."""
    text: Tensor | None = None
    """(N, L, D) states of L text tokens."""
    text_mask: Tensor | None = None
    """(N, L) bool, True for real tokens and False for padding; given wherever text is."""
    pooled: Tensor | None = None
    """(N, P) one vector for each text."""
    size: Tensor | None = None
    """(N, K) numbers about the image's size, in an order that the model names."""
    guidance: Tensor | None = None
    """(N,) guidance scale, for models that take it as an input."""

    def __post_init__(self) -> None:
        given = self.given()
        for name, tensor in given.items():
            if tensor.ndim != NUM_DIMENSIONS[name]:
                found = f"{name} of shape {tuple(tensor.shape)}"
                raise InvalidInput(found, f"{NUM_DIMENSIONS[name]} dimensions", "give one entry per image")
        lengths = {name: tensor.shape[0] for name, tensor in given.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} of {length} images" for name, length in lengths.items())
            raise InvalidInput(found, "the same number of images", "give one entry per image")
        text, mask = self.text, self.text_mask
        if (text is None) != (mask is None):
            raise InvalidInput("only one of text and text_mask", "both or neither", "give the other one too")
        if text is not None and mask is not None and text.shape[:2] != mask.shape:
            found = f"text of shape {tuple(text.shape)} with text_mask of shape {tuple(mask.shape)}"
            raise InvalidInput(found, "(N, L, D) with (N, L)", "give one entry of the mask per token")

    def __len__(self) -> int:
        """Return the number of images N; 0 if there are no fields."""
        return next((tensor.shape[0] for tensor in self.given().values()), 0)

    def given(self) -> dict[str, Tensor]:
        """Return the fields that are not None by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Conditions":
        """Return the same conditions on a device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.given().items()}
        return Conditions(**moved)

    def pin_memory(self) -> "Conditions":
        """Return the same conditions in pinned memory, from which a GPU copies asynchronously."""
        return Conditions(**{name: tensor.pin_memory() for name, tensor in self.given().items()})

    def repeat(self, count: int) -> "Conditions":
        """Return the conditions of all N images `count` times in a row, (count N, ...)."""
        repeated = {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in self.given().items()}
        return Conditions(**repeated)

    def chunk(self, count: int) -> "list[Conditions]":
        """Split the images into at most `count` batches of nearly equal size, as Tensor.chunk; none if no fields."""
        given = self.given()
        chunks = zip(*(tensor.chunk(count) for tensor in given.values()), strict=True)
        return [Conditions(**dict(zip(given, tensors, strict=True))) for tensors in chunks]

    def tensor_split(self, count: int) -> "list[Conditions]":
        """Split the images into `count` batches of nearly equal size, as Tensor.tensor_split; empty if no fields."""
        given = self.given()
        parts = zip(*(tensor.tensor_split(count) for tensor in given.values()), strict=True)
        return [Conditions(**dict(zip(given, tensors, strict=True))) for tensors in parts] or [self] * count

    def null(self, null_text: "Conditions | None" = None, null_class: int | None = None) -> "Conditions":
        """Return the conditions of as many images of no class and no text.

        Labels become null_class. text, text_mask and pooled become those of null_text, which has one row, those of the
        empty text. size and guidance say nothing about the content of an image, and stay.
        Raises InvalidInput if there are labels but no null_class, or texts but not the same fields of null_text.
        """
        changed: dict[str, Tensor] = {}
        if self.labels is not None:
            if null_class is None:
                raise InvalidInput("labels without a null class", "null_class", "use a model that has a null class")
            changed["labels"] = torch.full_like(self.labels, null_class)
        needed = self.given().keys() & {"text", "text_mask", "pooled"}
        empty = {} if null_text is None else null_text.repeat(len(self)).given()
        if needed - empty.keys():
            missing = ", ".join(sorted(needed - empty.keys()))
            raise InvalidInput(f"a null text without {missing}", "those of the empty text", "give them as null_text")
        return replace(self, **changed, **{name: empty[name] for name in needed})

    def drop(self, dropped: Tensor, null: "Conditions") -> "Conditions":
        """Return these conditions with all those of some images replaced by null ones.

        dropped: (N,) bool, True for the images whose conditions are replaced. null: what replaces them, of N images or
        of one.
        Raises InvalidInput if the two do not have the same fields.
        """
        kept, null = _pad_texts([self, null])
        replaced = {
            name: torch.where(dropped.view(-1, *[1] * (tensor.ndim - 1)), getattr(null, name), tensor)
            for name, tensor in kept.given().items()
        }
        return Conditions(**replaced)

    @staticmethod
    def cat(batches: "Sequence[Conditions]") -> "Conditions":
        """Join one or more batches. Shorter texts are padded with zeros, which the mask leaves out.

        Raises InvalidInput if the batches do not have the same fields, of the same widths.
        """
        padded = _pad_texts(batches)
        return Conditions(**{name: torch.cat([getattr(batch, name) for batch in padded]) for name in padded[0].given()})


LabelsOrConditions = Tensor | Conditions | None
"""What models, objectives and samplers take: labels (N,), conditions, or None for an unconditional model."""


def as_conditions(given: LabelsOrConditions) -> Conditions:
    """Return conditions as they are, and labels (N,) or None as conditions."""
    return given if isinstance(given, Conditions) else Conditions(labels=given)


def _pad_texts(batches: Sequence[Conditions]) -> list[Conditions]:
    """Pad the texts of batches to their longest. Raises InvalidInput if batches differ in fields or widths."""
    _check_same_fields(batches)
    longest = max((batch.text.shape[1] for batch in batches if batch.text is not None), default=0)
    return [_pad_text(batch, longest) for batch in batches]


def _pad_text(batch: Conditions, length: int) -> Conditions:
    if batch.text is None or batch.text_mask is None or batch.text.shape[1] == length:
        return batch
    more = length - batch.text.shape[1]
    return replace(batch, text=pad(batch.text, (0, 0, 0, more)), text_mask=pad(batch.text_mask, (0, more)))


def _check_same_fields(batches: Sequence[Conditions]) -> None:
    shapes = [_describe_widths(batch) for batch in batches]
    for shape in shapes:
        if shape != shapes[0]:
            raise InvalidInput(
                f"conditions with {shapes[0] or 'no fields'} beside conditions with {shape or 'no fields'}",
                "the same fields, of the same widths",
                "give all images the same kinds of conditions",
            )


def _describe_widths(conditions: Conditions) -> str:
    """Return the names of the fields, with the last dimension of those that hold vectors."""
    vectors = ("text", "pooled", "size")
    given = conditions.given().items()
    return ", ".join(f"{name} of width {tensor.shape[-1]}" if name in vectors else name for name, tensor in given)
