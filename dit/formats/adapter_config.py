"""What the config of a low-rank adapter says about its computation, and refusals of what raydit does not compute.

peft writes the config into adapter_config.json, and diffusers into the header of its file of weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit.formats.weights import read_metadata
from raydit.errors import InvalidInput

HEADER_ENTRY = "lora_adapter_metadata"
"""Name of the config among the texts in the header of diffusers' file."""
HEADER_PREFIX = "transformer."
"""What diffusers puts before the names of a config's fields in the header, as a pipeline has several models."""
UNSUPPORTED = {
    "use_dora": "DoRA, which also scales the columns of each weight",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "weights stored as (in, out)",
    "lora_bias": "biases of the factors",
    "layer_replication": "layers used several times",
    "target_parameters": "factors of bare parameters",
    "trainable_token_indices": "single rows of an embedding",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the base's weights",
    "alora_invocation_tokens": "aLoRA, which changes some tokens only",
    "arrow_config": "Arrow, which chooses among several adapters",
    "monteclora_config": "MonteCLoRA, which samples the factors",
}
"""Fields of an adapter's config by which it computes something else, and what."""
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights by which peft leaves the base's weights as they are."""


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Raise InvalidInput unless a config is of LoRA as `dit.formats.adapter` computes it."""
    kind = config.get("peft_type", "LORA")
    reason = None if kind == "LORA" else f"an adapter of the kind {kind}"
    reason = reason or next((words for name, words in UNSUPPORTED.items() if config.get(name)), None)
    if config.get("bias", "none") != "none":
        reason = "trained biases"
    if reason is not None:
        raise InvalidInput(f"{where}: found {reason}", "low-rank factors alone (LoRA)", "merge it with peft instead")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in INITIALISATIONS:
        raise InvalidInput(
            f"{where}: found init_lora_weights {initialisation!r}, by which peft changed the weights of the base",
            "an adapter of the base as it was",
            "save it again by peft with path_initial_model_for_weight_conversion, or merge it with peft",
        )


def read_header_config(file: Path) -> dict[str, Any]:
    """Return the config in the header of a file that diffusers wrote, by peft's names; empty if there is none.

    Raises InvalidInput if it is no JSON object.
    """
    text = read_metadata(file).get(HEADER_ENTRY)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{file}: found {HEADER_ENTRY} {text[:80]!r} in the header",
            "a JSON object with the adapter's config",
            "save the adapter again by diffusers",
        )
    return {name.removeprefix(HEADER_PREFIX): value for name, value in content.items()}
