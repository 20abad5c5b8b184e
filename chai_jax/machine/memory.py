"""What a compiled program takes."""

from typing import Any


def program_bytes(program: Any) -> int:
    """Bytes of all that a compiled program holds while it runs, by XLA's account."""
    memory = program.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(peak - memory.alias_size_in_bytes)
