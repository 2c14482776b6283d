"""`doctor` tells what this machine has, and as a probe whether a server serves."""

import json
import socket
from typing import Any

from grpc_health.v1 import health_pb2


def test_probe(command: Any, server: Any) -> None:
    done = command("doctor", "--grpc", server.address)
    assert (done.code, done.out) == (0, f"{server.address} is serving\n")
    server.probes.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    done = command("doctor", "--grpc", server.address)
    assert (done.code, done.out) == (1, f"{server.address} is not serving\n")


def test_probe_of_nobody(command: Any) -> None:
    done = command("doctor", "--grpc", "127.0.0.1:1", "--json")
    assert done.code == 1
    assert json.loads(done.out)["serving"] is False


def test_machine(command: Any) -> None:
    done = command("doctor", "--json")
    findings = {each["name"]: each for each in json.loads(done.out)}
    assert {
        "deltaserve",
        "python",
        "torch",
        "triton",
        "transformers",
        "grpcio",
        "cpu",
        "kernels",
        "disk",
        "memory",
    } <= (set(findings))
    assert findings["kernels"]["state"] == "ok"
    assert {"device", "cuda:0"} & set(findings)
    assert done.code == 0


def test_a_port_that_is_taken(command: Any) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 9400))
            taken.listen()
        except OSError:
            pass  # another process has it: just as well
        done = command("doctor", "--json")
    (port,) = [each for each in json.loads(done.out) if each["name"] == "port 9400"]
    assert port["state"] == "note"
    assert "--metrics-port" in port["hint"]
    assert done.code == 0
