"""Where a server listens."""

from __future__ import annotations

import socket

import pytest

from pipeline.errors import PipelineError
from pipeline.sockets import listen


def test_a_taken_port_is_a_mistake_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PipelineError, match=rf"--port {port}: cannot listen there"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "\udcff"])
def test_what_can_be_no_host_is_a_mistake_in_one_line(host: str) -> None:
    with pytest.raises(PipelineError, match=r"--host .*: not the name of a host; write") as error:
        listen(host, 0)
    assert str(error.value).isascii()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_every_address_is_also_that_of_this_machine(host: str) -> None:
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as listening:
        socket.create_connection(("127.0.0.1", listening.getsockname()[1])).close()
