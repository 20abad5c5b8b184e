"""Optimized HLO, as `compiled.as_text()` prints it, as data: computations, instructions, the bytes of shapes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][a-z\d\-]*)"
    r"\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands)rest`; `operands` are names."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The computation (or constant) that `name=` gives, or nothing."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


class Module:
    """The computations of an HLO module by name, its instructions by name, and which computation is the program."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations: dict[str, list[Instruction]] = {}
        self.instructions: dict[str, Instruction] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                operands = tuple(re.findall(r"%([\w.\-]+)", found["operands"]))
                if found["opcode"] in ("constant", "parameter"):
                    operands = (found["operands"],)  # the value, or which parameter it is
                parts = found["name"], found["shape"], found["opcode"], operands, found["rest"], bool(found["root"])
                self.instructions[found["name"]] = Instruction(*parts)
                current.append(self.instructions[found["name"]])

    def starting_at(self, computation: str) -> str:
        """The module's text with another computation for its program."""
        text = re.sub(r"^HloModule .*", "HloModule part", self.text, count=1)  # the rest of the line is the old entry's
        text = re.sub(r"^ENTRY ", "", text, flags=re.MULTILINE)
        return re.sub(rf"^%?{re.escape(computation)} \(", lambda found: f"ENTRY {found[0]}", text, flags=re.MULTILINE)

    def walk(self, computation: str, times: int = 1) -> Iterator[tuple[Instruction, int]]:
        """The instructions of a computation and of all it calls, with how often each runs; a fusion is one of them."""
        for one in self.computations[computation]:
            yield one, times
            if one.opcode == "while":
                yield from self.walk(one.attribute("body"), times * (self.trips(one) or 1))
            elif one.opcode == "call":
                yield from self.walk(one.attribute("to_apply"), times)
            elif one.opcode == "async-start":
                yield from self.walk(one.attribute("calls"), times)
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", one.rest):
                for name in re.findall(r"[\w.\-]+", branches[1]):
                    yield from self.walk(name, times)

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs whose condition is nothing but `counter < N`, as that of a scan, from 0 on.

        None where the data decide.
        """
        condition = self.computations[loop.attribute("condition")]
        bounds = [
            int(one.operands[0]) for one in condition if one.opcode == "constant" and one.shape[:3] in ("s32", "u32")
        ]
        compares = [one for one in condition if one.opcode == "compare" and "direction=LT" in one.rest]
        plain = {one.opcode for one in condition} <= {"compare", "constant", "get-tuple-element", "parameter", "copy"}
        if not (plain and len(bounds) == 1 and len(compares) == 1):
            return None
        return -(-bounds[0] // self._step(loop, compares[0]))

    def _step(self, loop: Instruction, compare: Instruction) -> int:
        """The constant that a loop's body adds to the counter that `compare` reads: 2 where XLA unrolled it once."""
        counter = self._copied(compare.operands[0])
        (root,) = (one for one in self.computations[loop.attribute("body")] if one.root)
        if counter.opcode != "get-tuple-element" or root.opcode != "tuple":
            return 1
        added = self._copied(root.operands[int(counter.attribute("index"))])
        steps = [one for one in map(self._copied, added.operands) if one.opcode == "constant"]
        return int(steps[0].operands[0]) if added.opcode == "add" and len(steps) == 1 else 1

    def _copied(self, name: str) -> Instruction:
        """What an instruction is a copy of."""
        one = self.instructions[name]
        return self._copied(one.operands[0]) if one.opcode == "copy" else one

    def open_loop(self) -> str:
        """The body of the first loop that the data end.

        Raises:
            ValueError: there is none.
        """
        for one, _ in self.walk(self.entry):
            if one.opcode == "while" and self.trips(one) is None:
                return one.attribute("body")
        raise ValueError("the program has no loop that its data end")


def nbytes(shape: str, fast: bool = True) -> int:
    """Bytes of an HLO shape, of all parts of a tuple: `(f32[2,3]{1,0}, bf16[4])` has 32.

    Args:
        fast: count what lies in fast memory, `S(1)` and above, too.
    """
    return sum(parts(shape, fast))


def parts(shape: str, fast: bool = False) -> list[int]:
    """The bytes of each part of an HLO shape; those in fast memory count as 0 if not said otherwise."""
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(kind) // 8
        if fast or "S(" not in layout
        else 0
        for kind, sizes, layout in SHAPE.findall(shape)
    ]


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    digits = re.search(r"\d+", kind)  # f32, s8, s4, f8e4m3fn
    return int(digits.group()) if digits else 0


def group_size(rest: str) -> int:
    """How many devices take part, from any of the three ways HLO writes replica groups; 1 where none is written."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or a part of one: 'x':(1)2
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 1
