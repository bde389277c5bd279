"""Reads a YAML file that people write by hand: small, plain, each key once. Recipes and sweeps come through here."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from wandapp.errors import WandappError, shorten
from wandapp.small_file import read_small

MAX_BYTES = 1 << 20  # the parser takes seconds and hundreds of bytes of memory for each megabyte


class _Loader(yaml.SafeLoader):
    """The safe loader with four differences.

    Numbers stay text for pydantic: YAML 1.1 reads 2:4 as 124 and 1e-7 as a word. Aliases are refused, since a few of them
    make a structure without end. A key that comes twice is refused, since the first would be lost. Of the tags that a file can
    write, such as !!float, only those of plain YAML are known.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] in ("bool", "null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("bool", "null", "str", "seq", "map")
    }

    def compose_node(self, parent: Any, position: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark  # the C reader's mark is no yaml.Mark to a type checker
            raise yaml.MarkedYAMLError(problem=f"the alias *{event.anchor} is refused", problem_mark=mark)
        return super().compose_node(parent, position)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} comes twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, numbers as text; `what` names the kind of file in messages, e.g. "recipe".

    raises  WandappError on a file that cannot be read, is large, or is anything but plain 'key: value' lines
    """
    try:
        data = read_small(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WandappError(f"{path}: the {what} cannot be read ({reason}); check the path") from None
    if len(data) > MAX_BYTES:
        raise WandappError(f"{path}: larger than {MAX_BYTES} bytes, so it is no {what}; check the path")
    try:
        mapping = yaml.load(data.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        place = f"{path}, line {mark.line + 1}" if mark else path
        raise WandappError(f"{place}: not valid YAML ({shorten(reason)}); write one 'key: value' per line") from None
    if not isinstance(mapping, dict):
        found = "nothing" if mapping is None else type(mapping).__name__
        raise WandappError(f"{path}: a {what} is a list of 'key: value' lines, got {found}")
    return {str(key): value for key, value in mapping.items()}
