"""YAML files as mappings and mappings as YAML, and one mapping laid over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{', '.join(twice)} stands twice in one mapping, {node.start_mark}.")
        return super().construct_mapping(node, deep=deep)


def read_mapping(source: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in YAML written out.

    Raises:
        ValueError: It is no valid YAML, no mapping, or has a key twice.
    """
    path = Path(source)
    text = path.read_text(encoding="utf-8") if source.endswith((".yaml", ".yml")) else source
    try:
        content = yaml.load(text, Loader=_Strict)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} is no file that ends in .yaml, and no mapping in YAML.")
    return content


class _Plain(yaml.SafeDumper):
    """Writes out twice what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def written(config: dict[str, Any]) -> str:
    """A mapping as YAML."""
    return yaml.dump(config, Dumper=_Plain, sort_keys=False)


def merged(config: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """One configuration laid over another: mappings key by key, anything else as a whole."""
    result = dict(config)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result
