"""Text that is written into a page or a picture."""


def printable(value: object) -> str:
    """A value as text; what cannot be shown (control characters, halves of surrogate pairs) becomes a space."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(value))
