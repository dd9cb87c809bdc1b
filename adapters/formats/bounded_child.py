"""The child process of `bounded`: parses JSON texts under limits of its own. Run by its path, on the standard library.

Arguments: address space in bytes, CPU seconds. Standard input: JSON texts, each behind its length (8 bytes, little
endian). Standard output: per text two numbers, the members of its object and all values in it, or -1 and -1 where it
does not parse; the parent, which then parses it again, says why.
"""

from __future__ import annotations

import json
import resource
import sys


def measure(text: bytes) -> tuple[int, int]:
    """Members of the object in `text`, and all the values in it however deep."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return -1, -1
    count, pending = 0, [root]
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return (len(root) if isinstance(root, dict) else 0), count


def main() -> None:
    """Limit this process, then parse."""
    memory_bytes, cpu_s = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while length := sys.stdin.buffer.read(8):
        print(*measure(sys.stdin.buffer.read(int.from_bytes(length, "little"))))


if __name__ == "__main__":
    main()
