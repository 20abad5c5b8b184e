"""HTML from parts: whatever is not `Markup` is text, and is escaped."""

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML already; made by `tag` alone."""


def printable(text: object) -> str:
    """As text, what cannot be shown (control characters, halves of surrogate pairs) replaced by a space."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))


def escape(text: object) -> Markup:
    """`Markup` as it is; anything else as the text it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text)))


def join(*parts: object) -> Markup:
    """Parts one after the other."""
    return Markup("".join(escape(part) for part in parts))


def tag(name: str, *parts: object, **attributes: object) -> Markup:
    """An element; `class_` gives its class, an attribute that is None is left out."""
    given = {key.rstrip("_"): value for key, value in attributes.items() if value is not None}
    opened = "".join(f' {key}="{html.escape(printable(value))}"' for key, value in given.items())
    return Markup(f"<{name}{opened}>{join(*parts)}</{name}>")


def image(source: str, alt: str, width: int) -> Markup:
    """A picture that is `width` CSS pixels wide where there is room."""
    return Markup(f'<img src="{html.escape(source)}" alt="{html.escape(printable(alt))}" width="{width}">')


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str) -> Markup:
    """A table that scrolls sideways where it is too wide, below its caption; the first cell of a row is its name."""
    names = tag("tr", *(tag("th", name, scope="col") for name in head))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag("table", tag("thead", names), tag("tbody", *lines))
    return join(tag("p", caption, class_="quiet"), tag("div", inner, class_="wide", tabindex="0"))


def pairs(values: Sequence[tuple[object, object]]) -> Markup:
    """Names and their values, in columns."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in values))
