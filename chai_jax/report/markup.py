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


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str | None = None) -> Markup:
    """A table that scrolls sideways where it is too wide; the first cell of each row is the row's name."""
    names = tag("tr", *(tag("th", name, scope="col") for name in head))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    about = [tag("caption", caption)] if caption else []
    inner = tag("table", *about, tag("thead", names), tag("tbody", *lines))
    return tag("div", inner, class_="wide", tabindex="0")
