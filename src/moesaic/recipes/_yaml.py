"""YAML as people mean it: `1e-4` is a number and a key that stands twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from moesaic._errors import InputError


class _Loader(yaml.SafeLoader):
    """Safe, and strict about keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys differ."""
        keys: list[Any] = []
        for part, _ in node.value:
            key = self.construct_object(part, deep=True)
            if key in keys:
                raise InputError(
                    f"the option {key!r} stands a second time in line {part.start_mark.line + 1}; "
                    "keep one of them"
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 asks for a point in every float.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Read one document.

    Raises:
        yaml.YAMLError: If it is not YAML.
        InputError: If a key stands twice.
    """
    return yaml.load(text, Loader=_Loader)
