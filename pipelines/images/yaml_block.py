"""Load untrusted YAML, in time and memory that grow with its length."""

from functools import lru_cache
from typing import Any

from raydit.printable import message_of

MAX_CARD_BYTES = 2**21
"""Longest YAML block that is parsed; that of a data set with 20,000 described classes is half as long."""
MAX_NUMBER_LENGTH = 100
"""Longest number. The conversion of YAML's numbers to the base 60 takes time with the square of their length."""
MAX_MERGED_FIELDS = 100_000
"""Fields that merge keys (<<) may copy, over the entire text. Merges of merges would copy them exponentially often."""
MAX_MERGED_AT_ONCE = 64


class YamlError(ValueError):
    """Raised for a text that is no YAML, or that says more than its length allows."""


def load_yaml(text: str) -> Any:
    """Parse YAML of plain values; None for an empty text. Raises YamlError."""
    try:
        return _loader()(text).get_single_data()
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except Exception as error:  # the constructors of dates and numbers raise anything
        raise YamlError(message_of(error)[:300]) from error


@lru_cache(maxsize=1)
def _loader() -> type:
    """Return PyYAML's safe loader with bounds, made at first use because of the import."""
    import yaml

    class BoundedLoader(yaml.SafeLoader):
        merged = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            before = len(node.value)
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge" and len(value.value) > MAX_MERGED_AT_ONCE:
                    if isinstance(value, yaml.SequenceNode):
                        raise YamlError(f"more than {MAX_MERGED_AT_ONCE} mappings are merged")
            super().flatten_mapping(node)
            self.merged += max(0, len(node.value) - before)
            if self.merged > MAX_MERGED_FIELDS:
                raise YamlError(f"more than {MAX_MERGED_FIELDS:,} fields are merged")

        def construct_number(self, node: yaml.ScalarNode) -> int | float:
            if len(node.value) > MAX_NUMBER_LENGTH:
                raise YamlError(f"a number of {len(node.value):,} characters")
            is_float = node.tag.endswith("float")
            return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)

    for kind in ("int", "float"):
        BoundedLoader.add_constructor(f"tag:yaml.org,2002:{kind}", BoundedLoader.construct_number)
    return BoundedLoader
