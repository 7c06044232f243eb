"""The weights that a training starts from: those of a checkpoint, fitted to the model that is trained.

What both models have is taken over to the bit. What they have in different shapes is adapted: classes by their names
(`dit.adaptation.labels`), the number of blocks (`depth`), the patch size and learned sigma (`patches`), and the grid of
positions (`positions`). Everything else is refused (`comparison`), unless it belongs to a part that is reset.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dit.adaptation.comparison import require_adaptable
from dit.adaptation.depth import adapt_depth
from dit.adaptation.draft_weights import Draft, TrainedModel, part_names
from dit.adaptation.labels import adapt_labels
from dit.adaptation.patches import adapt_patch_size, adapt_sigma
from dit.adaptation.positions import adapt_positions
from dit.model import meta_state

Fate = Literal["equal", "adapted", "fresh", "dropped"]


@dataclass(frozen=True)
class TensorFate:
    """What became of one tensor."""

    name: str
    """Its name in the model that is trained; of a dropped one, that in the model of the start."""
    fate: Fate
    """"equal": taken over to the bit; "adapted": changed; "fresh": as in a training from scratch; "dropped": unused."""
    note: str = ""
    """Tensors that differ from the start, with what was done to them."""


@dataclass(frozen=True)
class StartWeights:
    """The weights at the start of a training, and where each of them comes from."""

    weights: dict[str, Tensor]
    """State dict of the model that is trained, float32."""
    fates: tuple[TensorFate, ...]
    """One for every tensor of either model, in the order of the trained one; dropped ones come last."""


def start_weights(
    weights: Mapping[str, Tensor],
    base: TrainedModel,
    target: TrainedModel,
    *,
    reset: Collection[str] = (),
    fresh: Callable[[], Mapping[str, Tensor]],
) -> StartWeights:
    """Return the weights of the target to start from, made of a state dict of the base.

    reset: parts that are not taken over (`dit.config.ResetPart`). With "objective", another objective is accepted; the
    weights are kept, except for the embedding of timesteps where the kind of process is another, because a diffusion
    counts timesteps to 999 and the times of a flow are in [0, 1]. fresh: returns the state dict that the target is
    initialised to; called only if some of it is needed. Raises InvalidInput if the two models do not fit.
    """
    require_adaptable(base, target, reset)
    draft = Draft(dict(weights))
    expected = meta_state(target.config)
    anew = _fresh_prefixes(base, target, reset)
    for prefix in anew:  # first, because they need not be adaptable
        for name in [name for name in draft.weights if name.startswith(prefix)]:
            del draft.weights[name]
            draft.dropped += [] if name in expected else [name]
    for adapt in (adapt_depth, adapt_labels, adapt_sigma, adapt_patch_size, adapt_positions):
        adapt(draft, base, target)
    draft.dropped += [name for name in draft.weights if name not in expected]
    return _finish(draft, expected, anew, fresh)


def _fresh_prefixes(base: TrainedModel, target: TrainedModel, reset: Collection[str]) -> tuple[str, ...]:
    """Return the first parts of the names of all tensors that are not taken over."""
    parts = part_names(base.config)
    anew = [part for part in parts if part in reset]
    if "objective" in reset and base.objective["kind"] != target.objective["kind"]:
        anew.append("timesteps")
    return tuple(prefix for part in anew for prefix in parts[part])


def _finish(
    draft: Draft,
    expected: Mapping[str, Tensor],
    anew: tuple[str, ...],
    fresh: Callable[[], Mapping[str, Tensor]],
) -> StartWeights:
    lacking = [name for name in expected if name not in draft.weights]
    assert all(name.startswith(anew) for name in lacking), f"nothing says where {lacking} come from"
    initial = fresh() if lacking else {}
    weights: dict[str, Tensor] = {}
    fates: list[TensorFate] = []
    for name, like in expected.items():
        tensor = initial[name] if name in lacking else draft.weights[name]
        assert tensor.shape == like.shape, f"{name}: {tuple(tensor.shape)} for {tuple(like.shape)}"
        weights[name] = tensor.to(like.dtype)
        note = draft.notes.get(name, "")
        fates.append(TensorFate(name, "fresh" if name in lacking else "adapted" if note else "equal", note))
    fates += [TensorFate(name, "dropped") for name in draft.dropped]
    return StartWeights(weights, tuple(fates))


def summarize_fates(fates: Collection[TensorFate]) -> Iterator[str]:
    """Yield a line for each group of tensors: its name, how many have which fate, and what was done to them."""
    groups: dict[str, list[TensorFate]] = {}
    for each in fates:
        groups.setdefault(each.name.split(".")[0], []).append(each)
    width = max(map(len, groups), default=0)
    for name, group in groups.items():
        counts = Counter(each.fate for each in group)
        text = ", ".join(f"{count} {fate}" for fate, count in counts.items())
        notes = Counter(each.note for each in group if each.note)
        if len(notes) > 1 and name.endswith("blocks"):
            copies = sum("identity" in each.note for each in group)
            text += f" (copied to other depths{', copies start as the identity' if copies else ''})"
        elif notes:
            text += f" ({'; '.join(notes)})"
        yield f"{name:<{width}}  {text}"


def fates_by_kind(fates: Collection[TensorFate]) -> dict[Fate, list[str]]:
    """Return the names of all tensors by their fate, adapted ones with a note, as a checkpoint records them."""
    table: dict[Fate, list[str]] = {}
    for each in fates:
        table.setdefault(each.fate, []).append(f"{each.name}: {each.note}" if each.note else each.name)
    return table
