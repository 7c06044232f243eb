"""How extractors are named in recipes, protocols and the names of metrics.

    inception, dinov2-vit-l-14, ...    a network of raydit's own table with its published weights
    timm:NAME                          a model of timm, such as timm:vit_base_patch16_224.augreg_in21k_ft_in1k
    transformers:ID                    a vision model of transformers, by its hub id or by a folder
    MODULE:FUNCTION                    a function of the user's, such as my_features:embed

Imports nothing heavy, so that a recipe can be checked at once.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Literal

from raydit.errors import InvalidInput

INCEPTION = "inception"
"""Name of the extractor with the published FID weights. Only this one may give FID and its kin their names."""
CLIP_L_336 = "clip-vit-l-14-336px"
"""Name of the extractor with the weights of CMMD (Jayasumana et al. 2024). Only this one may give CMMD its name."""

NETWORKS = (
    "efficientnet-lite0",
    INCEPTION,
    "dinov2-vit-s-14",
    "dinov2-vit-b-14",
    "dinov2-vit-l-14",
    "efficientnet-lite1",
    "efficientnet-lite2",
    "clip-vit-b-32",
    "clip-vit-l-14",
    CLIP_L_336,
)
"""The networks of `evaluation.features.extractor_table`, which is slower to import than a recipe is to check."""

TIMM = "timm:"
TRANSFORMERS = "transformers:"
ExtractorKind = Literal["network", "timm", "transformers", "function"]

_TIMM_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def extractor_kind(name: str) -> ExtractorKind:
    """Return what an extractor's name stands for. Raises InvalidInput for a name that stands for nothing."""
    if name in NETWORKS:
        return "network"
    if name.startswith(TIMM) and _TIMM_NAME.fullmatch(name.removeprefix(TIMM)):
        return "timm"
    if name.startswith(TRANSFORMERS) and name.removeprefix(TRANSFORMERS).strip("/ "):
        return "transformers"
    if not name.startswith((TIMM, TRANSFORMERS)) and _FUNCTION.fullmatch(name):
        return "function"
    raise InvalidInput(
        f"found {name!r}",
        f"one of {', '.join(NETWORKS)}, or {TIMM}NAME, {TRANSFORMERS}ID or MODULE:FUNCTION",
        _suggest(name),
    )


def recipe_name(recorded: str, sha256: str) -> str:
    """Return an extractor's name in a recipe from that in a protocol; Inception's for one that no recipe can name."""
    plain = recorded.removesuffix(f"-{sha256[:8]}")
    try:
        extractor_kind(plain)
    except InvalidInput:
        return INCEPTION
    return plain


def _suggest(name: str) -> str:
    """Return what a user probably meant by a wrong name."""
    for prefix in (TIMM, TRANSFORMERS):
        if re.match(rf"{prefix[:-1]}[^\w]", name) and name[len(prefix) :]:
            return f'Did you mean "{prefix}{name[len(prefix) :]}"?' if name[len(prefix) - 1] != ":" else "correct it"
    wanted = re.sub(r"[_/\s]+", "-", name.lower())
    close = difflib.get_close_matches(wanted, NETWORKS, n=1, cutoff=0.5)
    close = close or [known for known in NETWORKS if len(wanted) > 3 and known.startswith(wanted)]
    return f'Did you mean "{close[-1]}"?' if close else "correct the name"


def metric_part(extractor: str) -> str:
    """Return an extractor's part of the names of metrics: every character but letters, digits and "_" becomes "_".

    efficientnet-lite0 -> efficientnet_lite0, timm:vit_base_patch16_224.augreg -> timm_vit_base_patch16_224_augreg.
    Names that differ in these characters alone have one part in common; `check_distinct` refuses them side by side.
    """
    return re.sub(r"[^0-9A-Za-z_]", "_", extractor)


def check_distinct(extractors: Iterable[str]) -> None:
    """Raise InvalidInput if two extractors would give their metrics the same names."""
    owners: dict[str, str] = {}
    for extractor in extractors:
        other = owners.setdefault(metric_part(extractor), extractor)
        if other != extractor:
            raise InvalidInput(
                f"found {other!r} and {extractor!r}, whose metrics would both be named {metric_part(extractor)!r}",
                "extractors that differ in letters or digits",
                "score by them in separate outputs, or rename one",
            )
