"""Reading a launch file: YAML, by sections or flat, into flat settings with their places."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting of a launch file."""

    name: str  # flat
    value: Any
    place: str  # "file:line"


Sections = Mapping[str, Collection[str]]  # section -> names of its settings; a setting's name is in one section only


def read_launch_file(path: Path, sections: Sections) -> list[Entry]:
    """Read the settings of a YAML file, by sections or flat, `-` or `_` in names; raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read launch file {str(path)!r}: {reason}") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        entries = list(_entries(loader, root, path, sections)) if root is not None else []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return _without_repeats(entries)


def _entries(loader: yaml.SafeLoader, root: yaml.Node, path: Path, sections: Sections) -> Iterator[Entry]:
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{_place(path, root)}: a launch file must hold 'name: value' lines")
    section_of = {name: section for section, names in sections.items() for name in names}
    for key, value in root.value:
        name = _name(loader, key, path)
        whole = f"{name}_config"  # the setting that is a section by itself, if there is one
        if whole in sections.get(name, ()) and isinstance(value, yaml.MappingNode) and not _names(value, whole):
            yield Entry(whole, loader.construct_object(value, deep=True), _place(path, key))
        elif name in sections and isinstance(value, yaml.MappingNode):
            yield from _section_entries(loader, name, value, path, section_of)
        elif name in section_of:
            yield Entry(name, loader.construct_object(value, deep=True), _place(path, key))
        elif name in sections and value.tag == "tag:yaml.org,2002:null":
            continue  # a section whose every line is commented out
        elif name in sections:
            raise ConfigError(f"{_place(path, key)}: {name!r} is a section; its settings go below it, indented")
        else:
            raise unknown_setting(key.value, [*section_of, *sections], _place(path, key))


def _section_entries(
    loader: yaml.SafeLoader, section: str, node: yaml.MappingNode, path: Path, section_of: Mapping[str, str]
) -> Iterator[Entry]:
    for key, value in node.value:
        name = _name(loader, key, path)
        if name not in section_of:
            raise unknown_setting(key.value, section_of, _place(path, key))
        if section_of[name] != section:
            raise ConfigError(f"{_place(path, key)}: {name!r} belongs to section {section_of[name]!r}, not {section!r}")
        yield Entry(name, loader.construct_object(value, deep=True), _place(path, key))


def _names(node: yaml.MappingNode, setting: str) -> bool:
    """Whether one of a mapping's keys is this setting."""
    return any(str(key.value).replace("-", "_") == setting for key, _ in node.value)


def _name(loader: yaml.SafeLoader, key: yaml.Node, path: Path) -> str:
    name = loader.construct_object(key, deep=True)
    if not isinstance(name, str):
        raise ConfigError(f"{_place(path, key)}: a setting's name must be text, got {name!r}")
    return name.replace("-", "_")


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _without_repeats(entries: list[Entry]) -> list[Entry]:
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in first:
            raise ConfigError(f"{entry.place}: {entry.name!r} is set twice; first at {first[entry.name].place}")
        first[entry.name] = entry
    return entries


def unknown_setting(name: object, known: Iterable[str], place: str = "") -> ConfigError:
    """The error for a name that is no setting, with the nearest that is."""
    near = difflib.get_close_matches(str(name).replace("-", "_"), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "'jaxserve config --schema' lists all settings"
    return ConfigError(f"{place}{': ' if place else ''}unknown setting {name!r}; {hint}")
