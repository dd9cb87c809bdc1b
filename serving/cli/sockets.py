"""Which ports a process and its descendants listen on, from Linux's /proc."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LISTEN = "0A"
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Listener:
    """One open port and the process that holds it."""

    address: str
    port: int
    pid: int
    process: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.address).is_loopback


def listeners(root: int) -> list[Listener]:
    """Every listening TCP socket of process `root` and its descendants, by port. Empty without /proc."""
    sockets = dict(_listening())
    found = {
        (sockets[inode], pid, _name(pid))
        for pid in _family(root)
        for inode in _socket_inodes(pid)
        if inode in sockets
    }
    return sorted(
        (Listener(address, port, pid, name) for (address, port), pid, name in found),
        key=lambda item: item.port,
    )


def _listening() -> Iterator[tuple[int, tuple[str, int]]]:
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].partition(":")
                    yield int(fields[9]), (_address(address), int(port, 16))


def _address(text: str) -> str:
    """The kernel prints addresses as 32-bit words in the machine's byte order (here: little-endian)."""
    words = (bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8))
    address = ipaddress.ip_address(b"".join(words))
    # an IPv4 address in an IPv6 socket
    return str(getattr(address, "ipv4_mapped", None) or address)


def _family(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            # the name, in parentheses, may itself hold spaces and parentheses
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _socket_inodes(pid: int) -> Iterator[int]:
    with suppress(OSError):  # ended, or another user's
        for entry in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                if found := _SOCKET.fullmatch(os.readlink(entry)):
                    yield int(found[1])


def _name(pid: int) -> str:
    with suppress(OSError, IndexError):  # ended, or a kernel thread
        words = (PROC / str(pid) / "cmdline").read_text().split("\0")
        names = [Path(word).name for word in words[:3] if word and not word.startswith("-")]
        # a script rather than its interpreter; a Ray actor without the method that it runs just now
        return names[names[0].startswith("python") and len(names) > 1].partition(".listen")[0]
    return "?"
