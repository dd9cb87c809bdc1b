"""What is wrong with an upload: the list that readers fill, and how messages name what users sent.

Names (keys, tensors, files) are echoed escaped and shortened. Values never are: a message says what kind of value
it got and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapters.errors import InvalidDelta

MAX_LISTED = 500
_MAX_NAME = 160
_MAX_TEXT = 2000


class Problems:
    """Everything wrong with one upload, in the order found.

    `param` is the field at fault of the first problem: readers check the outermost claims (file set, method,
    backbone) first.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.param: str | None = None

    def add(self, text: str, *, param: str = "adapter") -> None:
        """Note one problem, a whole sentence with its remedy."""
        self.param = self.param or param
        shown = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
        # names are quoted where they are put in; this covers text from deeper layers
        self.texts.append("".join(char if " " <= char <= "~" else _escaped(char) for char in shown))

    def extend(self, texts: Iterable[str]) -> None:
        """Note several problems of the adapter's content."""
        for text in texts:
            self.add(text)

    def raise_if_any(self) -> None:
        """Raises InvalidDelta with every problem; past MAX_LISTED the rest is counted, so that replies stay small."""
        if not self.texts:
            return
        listed = self.texts[:MAX_LISTED]
        if rest := len(self.texts) - len(listed):
            listed.append(f"... and {rest} more problems.")
        raise InvalidDelta(listed, param=self.param)


def quoted(name: str) -> str:
    """`name` in quotes, control and non-ASCII characters escaped, the middle of a long name left out."""
    half = _MAX_NAME // 2
    shown = name if len(name) <= _MAX_NAME else f"{name[:half]}...{name[-half:]}"
    return "'" + _escaped(shown) + "'"


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def kind_of(value: object) -> str:
    """What sort of JSON value this is, without its content."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def name_or_kind(value: object) -> str:
    """`value` in quotes where it is a short identifier, such as a method's name; else only what sort it is."""
    if isinstance(value, str) and len(value) <= 32 and value.isascii() and value.isidentifier():
        return f"'{value}'"
    return kind_of(value)
