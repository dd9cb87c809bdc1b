"""The HTTP ports, checked and kept before the minute-long start rather than found taken at its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from adapters.errors import InvalidRequest


@contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """`port`, or a free one for 0, kept for this user's processes while the body runs.

    The socket that keeps it is bound and does not listen: it gets no connections, and lets those share the port
    that set SO_REUSEPORT, as Serve's proxies do. Raises InvalidRequest where the port can't be had.
    """
    with _explained(host, port):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            # without SO_REUSEPORT, else another server's listening socket would be joined, not noticed
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
            chosen = int(probe.getsockname()[1])
    with closing(socket.socket(family, socket.SOCK_STREAM)) as keeper:
        with suppress(OSError):  # taken in this instant: Serve will say so
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind((host, chosen))
        yield chosen


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of this process on `port`, or a free one for 0, that does not listen yet; closed with the body.

    Raises InvalidRequest where the port can't be had.
    """
    with _explained(host, port):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
    with closing(made):
        with _explained(host, port):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
        yield made


@contextmanager
def _explained(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"The server can't listen on {host}, port {port}: {error.strerror or error}.",
            param="port",
            remedy="Stop what listens there, or choose another with --port (0 takes a free one).",
        ) from None
