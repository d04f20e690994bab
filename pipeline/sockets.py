"""Where a server listens."""

from __future__ import annotations

import socket

from pipeline.errors import PipelineError


def listen(host: str, port: int, *, backlog: int | None = None) -> socket.socket:
    """A socket that listens at an address.

    Args:
        host: name or IP address of this machine; `::` is every address, of IPv4 too.
        port: 0 for any free one.
        backlog: how many connections may wait; none: as many as the system has it.

    Raises:
        PipelineError: it cannot, for the port is taken, or the address is none or not this
            machine's.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(place, family=family, backlog=backlog, dualstack_ipv6=both)
    except UnicodeError:  # of the codec of names
        raise PipelineError(
            f"--host {host!a}: not the name of a host; write that of this machine, or an IP address"
        ) from None
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise PipelineError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another port, "
            "port 0 for a free one, or end what uses it"
        ) from None
