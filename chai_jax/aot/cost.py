"""What a compiled program costs one device: FLOPs, bytes to and from HBM, and bytes sent to others.

XLA's own account, `compiled.cost_analysis()`, does not serve for programs compiled ahead of time for TPUs (libtpu
0.0.41). It counts a loop's body once: a scan of 16 products of two 4096 x 4096 matrices has 1.4e11 FLOPs, as a single
product, not 2.2e12. Its bytes are all that operations read and write, fast memory (VMEM) included: 2.1e6 for a chain of
eight products of 256 x 256 matrices that stays there, of which 2.6e5 come from HBM or go to it. It says nothing of
collectives.

So FLOPs of each computation are XLA's, and the rest is read from the program's text: how often a loop runs, what goes
to and from HBM, and the collectives. A loop that ends by its data counts once, and is reported as such.
"""

import re
from dataclasses import dataclass

import jax
from jaxlib import _jax

try:
    from jaxlib import _hlo  # type: ignore[attr-defined]
except ImportError:  # before jaxlib 0.10.2
    _hlo = _jax

from chai_jax.aot.hlo import Instruction, Module, group_size, nbytes, parts

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is what is written into the first, in place
# These name or start what others do: they move nothing themselves.
STILL = (
    "get-tuple-element",
    "tuple",
    "parameter",
    "bitcast",
    "constant",
    "while",
    "call",
    "conditional",
    "async-start",
)


@dataclass(frozen=True)
class Collective:
    """One collective operation of one device: the bytes of its operands, its group, and how often it runs."""

    kind: str
    nbytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes a device sends over all runs, in a ring (Thakur et al. 2005): a lower bound of any algorithm.

        With n devices and operands of b bytes: all-reduce 2 b (n - 1) / n, reduce-scatter and all-to-all
        b (n - 1) / n, all-gather b (n - 1), a permutation b.
        """
        n = self.group
        shares = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0, "collective-permute": 1.0}
        return self.nbytes * self.times * shares.get(self.kind, (n - 1) / n)


@dataclass(frozen=True)
class ProgramCost:
    """What one device does in one run of a program.

    Attributes:
        flops: multiplications and additions.
        hbm_bytes: read from and written to HBM; of what is sliced or updated in place, the part that is.
        collectives: in no particular order.
        open_loops: loops without a known trip count, each counted as one iteration.
    """

    flops: float
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    open_loops: int

    @property
    def collective_bytes(self) -> int:
        """Bytes of the operands of all collectives, over all their runs."""
        return sum(one.nbytes * one.times for one in self.collectives)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends for them (see `Collective.sent`)."""
        return sum((one.sent for one in self.collectives), 0.0)


def program_cost(text: str, per_iteration: bool = False) -> ProgramCost:
    """The cost of an optimized HLO module, as `compiled.as_text()` prints it, for each device of it.

    Args:
        per_iteration: of the program's loop that the data end (decoding: one token), what is around it left out.

    Raises:
        ValueError: per iteration, of a program without such a loop.
    """
    module = Module(text)
    root = module.open_loop() if per_iteration else module.entry
    flops, moved, open_loops = _flops(module, root), 0, 0
    collectives = []
    channels: set[str] = set()
    for one, times in module.walk(root):
        moved += times * _moved(module, one)
        fused = module.computations[one.attribute("calls")] if one.opcode == "fusion" else []
        for part in fused or [one]:
            # An asynchronous collective is spread over several fusions, each of which names it.
            channel = part.attribute("channel_id") or part.name
            if _kind(part) in COLLECTIVES and channel not in channels:
                channels.add(channel)
                operands = sum(nbytes(module.instructions[name].shape) for name in part.operands)
                moved += times * (operands + nbytes(part.shape)) if fused else 0
                scatters = one.attribute("calls").startswith("all-reduce-scatter")  # XLA's name for such a fusion
                kind = "reduce-scatter" if scatters else _kind(part)
                collectives.append(Collective(kind, operands, group_size(part.rest), times))
        if one.opcode == "while":
            trips = module.trips(one)
            open_loops += trips is None
            if trips is not None and trips > 1:
                flops += times * (trips - 1) * _flops(module, one.attribute("body"))
    return ProgramCost(flops, moved, tuple(collectives), open_loops)


def _kind(one: Instruction) -> str:
    return one.opcode.removesuffix("-start")


def _flops(module: Module, computation: str) -> float:
    """FLOPs of a computation by XLA's analysis, loops within it counted once."""
    parsed = _hlo.hlo_module_from_text(module.starting_at(computation))
    found = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, parsed)
    return found.get("flops", 0.0)


def _moved(module: Module, one: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM."""
    if one.opcode in STILL or one.opcode.endswith(("-done", "-update")):
        return 0
    sizes = [nbytes(module.instructions[name].shape, fast=False) for name in one.operands]
    if one.opcode == "custom-call" and (
        changed := re.search(r"output_to_operand_aliasing={{}: \((\d+), {}\)}", one.rest)
    ):
        # A kernel that changes an array in place does not say how much of it: it is not counted.
        return sum(sizes) - sizes[int(changed[1])]
    if one.opcode == "fusion":
        body = module.computations[one.attribute("calls")]
        uses = [_uses(module, body, index) for index in range(len(sizes))]
        results = _results(module, body)
    else:
        uses = [[(one, place)] for place in range(len(sizes))]
        results = [one]
    fused = one.opcode == "fusion"
    read = sum(_part(users, size, fused) for size, users in zip(sizes, uses, strict=True))
    if one.opcode.endswith("-start"):  # its result names the operands again
        return read + max(0, nbytes(one.shape, fast=False) - sum(sizes))
    made = zip(results, parts(one.shape), strict=False)
    return read + sum(_written(module, by, size) for by, size in made if not (fused and _kind(by) in COLLECTIVES))


def _uses(module: Module, body: list[Instruction], index: int) -> list[tuple[Instruction, int]]:
    """Which instructions of a fusion (and of fusions within it) use its operand `index`, and as which of their own."""
    name = next((one.name for one in body if one.opcode == "parameter" and one.operands == (str(index),)), "")
    found = []
    for one in body:
        if name in one.operands:
            place = one.operands.index(name)
            inner = module.computations[one.attribute("calls")] if one.opcode == "fusion" else []
            found += _uses(module, inner, place) or [(one, place)]
    return found


def _part(users: list[tuple[Instruction, int]], size: int, fused: bool) -> int:
    """Bytes that are read of an operand of `size` bytes: of one that is only sliced, or updated in place, a part.

    What a collective within a fusion reads and writes is counted with the collective.
    """
    total = 0
    for user, place in users:
        if place == 0 and user.opcode in SLICES:
            total += nbytes(user.shape) - (size if user.opcode.endswith("-start") else 0)
        elif not (place == 0 and user.opcode in UPDATES) and not (fused and _kind(user) in COLLECTIVES):
            return size
    return min(total, size)


def _results(module: Module, body: list[Instruction]) -> list[Instruction]:
    """What a fusion's results are made by, one for each part of its shape."""

    def source(one: Instruction) -> Instruction:
        if one.opcode == "fusion":
            return source(next(part for part in module.computations[one.attribute("calls")] if part.root))
        return source(module.instructions[one.operands[0]]) if one.opcode == "bitcast" else one

    root = next(one for one in body if one.root)
    made = [module.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [source(one) for one in made]


def _written(module: Module, result: Instruction, size: int) -> int:
    """Bytes that are written of a result of `size` bytes: of one that is updated in place, what is new."""
    if result.opcode not in UPDATES:
        return size
    return min(size, nbytes(module.instructions[result.operands[UPDATES[result.opcode]]].shape))
