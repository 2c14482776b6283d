"""Ports that are taken, and addresses that are not ours."""

import socket

import pytest

from deltaserve.app import ports
from deltaserve.errors import FailedPrecondition


def test_taken_ports_are_told_by_their_flags() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FailedPrecondition, match="--grpc-port") as refused:
            ports.check("127.0.0.1", taken.getsockname()[1], "--grpc-port")
        assert refused.value.reason == "PORT_TAKEN"
    ports.check("127.0.0.1", 0, "--grpc-port")
    with pytest.raises(FailedPrecondition, match=r"192\.0\.2\.1"):
        ports.check("192.0.2.1", 0, "--grpc-port")  # nobody's address
