"""Pickles read as data: a stack machine for the opcodes that a state dict needs, which calls only what it was given.

Python's own unpickler hashes and compares whatever a pickle says, which alone can take for ever, and makes room for as
many objects as a pickle says. Here every opcode takes about as long as it is, and their number and bytes are bounded.
"""

import pickletools
from collections.abc import Callable
from typing import Any

# Of the pickles of a checkpoint, and of the table of contents of its archive; they have some 100 KB.
MOST_PICKLE_BYTES = 1 << 22
MOST_OPCODES = 1 << 20  # of a pickle; a state dict has some fifty for each tensor
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Opcodes that push what follows them.
PUSH = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8")  # fmt: skip


class Pairs(list[tuple[Any, Any]]):
    """A dict as its (key, value) pairs, in order: keys may be anything, and nothing is hashed."""


class Limited:
    """A file that fails once more than `most` bytes were read of it, however many it is asked for."""

    def __init__(self, file: Any, most: int):
        self._file, self._most, self._left = file, most, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        return self._count(self._file.read(self._left + 1 if size < 0 else min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"more than {self._most:,} bytes beside its tensors")
        return data


def unpickle(file: Any, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> Any:
    """What the pickle that begins here describes; the file is left behind it.

    Dicts come as `Pairs`, and attributes are left out.

    Args:
        file: with `read` and `readline`, best a `Limited` one.
        find: from module and name to the function or value that stands for it; raises for all that is not known.
        persistent: from a persistent id to the object that it stands for.

    Raises:
        Exception: of nearly any kind, where the pickle is cut, contradicts itself, or needs more than is read here.
    """
    machine = _Machine(find, persistent)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_OPCODES:
            raise ValueError(f"a pickle of more than {MOST_OPCODES:,} steps")
        if opcode.name in PUSH:
            machine.stack.append(argument)
        elif opcode.name in VALUES:
            machine.stack.append(VALUES[opcode.name])
        elif opcode.name not in ("PROTO", "FRAME", "STOP"):
            machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    def __init__(self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]):
        self.stack: list[Any] = []
        self._find, self._persistent = find, persistent
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One opcode, if it is not one that pushes a constant."""
        stack = self.stack
        match name:
            case "MARK":
                self._marks.append(len(stack))
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                many = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
                stack.append(tuple(self._take(many[name]) if name in many else self._since_mark()))
            case "EMPTY_LIST" | "LIST":
                stack.append([] if name == "EMPTY_LIST" else self._since_mark())
            case "APPEND" | "APPENDS":
                items = self._take(1) if name == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "EMPTY_DICT" | "DICT":
                stack.append(Pairs() if name == "EMPTY_DICT" else _pairs(self._since_mark()))
            case "SETITEM" | "SETITEMS":
                items = self._take(2) if name == "SETITEM" else self._since_mark()
                self._top(Pairs).extend(_pairs(items))
            case "GLOBAL" | "STACK_GLOBAL":
                module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self._take(2)
                if type(module) is not str or type(attribute) is not str:
                    raise ValueError("a name that is no text")
                stack.append(self._find(module, attribute))
            case "REDUCE":
                function, arguments = self._take(2)
                if not callable(function) or type(arguments) is not tuple:
                    raise ValueError(f"a call of a {type(function).__name__}")
                stack.append(function(*arguments))
            case "BUILD":  # attributes: torch gives a state dict some, and nothing here needs any
                stack.pop()
                self._top(Pairs)
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case _:
                raise ValueError(f"the opcode {name}")

    def _take(self, count: int) -> list[Any]:
        """The last `count` objects, off the stack."""
        at = len(self.stack) - count
        if at < (self._marks[-1] if self._marks else 0):
            raise ValueError("a pickle that takes more than it has made")
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def _since_mark(self) -> list[Any]:
        taken = self._take(len(self.stack) - self._marks[-1])
        self._marks.pop()
        return taken

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a change of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


def _pairs(items: list[Any]) -> Pairs:
    return Pairs(zip(items[::2], items[1::2], strict=True))
