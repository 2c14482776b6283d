"""Whether ports are free. Imports nothing slow, for a taken port is told before torch is there."""

import socket

from deltaserve.errors import FailedPrecondition


def check(host: str, port: int, flag: str) -> None:
    """Tells at once what listening would tell when the backbone is loaded. Raises FailedPrecondition."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise taken(host, port, flag, error) from error


def taken(host: str, port: int, flag: str, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot listen on {host}:{port}: {error.strerror or error}; {flag} and --host change them",
        reason="PORT_TAKEN",
    )
