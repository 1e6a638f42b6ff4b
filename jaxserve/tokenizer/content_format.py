"""Whether a chat template takes a message's content as one string, as a list of parts, or as either."""

from __future__ import annotations

from enum import Enum

from jinja2 import nodes

_TYPE_TESTS = {"string", "iterable", "sequence", "mapping"}


class ContentFormat(Enum):
    """What a template can do with a message's content."""

    TEXT = "text"  # prints it
    PARTS = "parts"  # loops over it, whatever it is
    EITHER = "either"  # looks first


def content_format(template: nodes.Template) -> ContentFormat:
    """Read the template: does it loop over a message's content, or a name set to it, and does it ask for its type?"""
    names = {"content"}  # macros and loops are commonly handed the content under its own name
    for assignment in template.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For)):
        return ContentFormat.TEXT
    tests = template.find_all(nodes.Test)
    asks = any(test.name in _TYPE_TESTS and _is_content(test.node, names) for test in tests)
    return ContentFormat.EITHER if asks else ContentFormat.PARTS


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
