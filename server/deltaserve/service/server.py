"""The gRPC server: options, health, reflection, and which servicers stand behind it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from deltaserve.errors import FailedPrecondition
from deltaserve.metrics import Metrics
from deltaserve.service.deltas import DeltaServicer
from deltaserve.service.inference import InferenceServicer
from deltaserve.service.interceptors import Interceptor
from deltaserve_protos.v1 import deltas_pb2, deltas_pb2_grpc, inference_pb2, inference_pb2_grpc

NAMES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    deltas_pb2.DESCRIPTOR.services_by_name["DeltaService"].full_name,
)
_AGE_MS = 30 * 60 * 1000
"""A connection is asked to go after this long, so that balancers spread clients anew."""


def options(max_message_bytes: int) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_age_ms", _AGE_MS),
        ("grpc.max_connection_age_grace_ms", _AGE_MS),
    )


_FLUSH = 0.2
"""Seconds for the last statuses to leave."""


class Server:
    """Not listening before `start`, not SERVING before `ready`."""

    def __init__(
        self, inference: InferenceServicer, deltas: DeltaServicer, metrics: Metrics, max_message_bytes: int
    ) -> None:
        self._interceptor = Interceptor(metrics)
        self._server = grpc.aio.server(interceptors=(self._interceptor,), options=options(max_message_bytes))
        self._health = health.HealthServicer()
        add_inference: Any = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        add_deltas: Any = deltas_pb2_grpc.add_DeltaServiceServicer_to_server
        add_inference(inference, self._server)
        add_deltas(deltas, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*NAMES, HEALTH, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises FailedPrecondition where it is taken."""
        await self._all(health_pb2.HealthCheckResponse.NOT_SERVING)
        place = f"[{host}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{place}:{port}")
        except RuntimeError as error:
            raise FailedPrecondition(
                f"cannot listen on {place}:{port}: the port is taken, or the address is not this machine's; "
                "--grpc-port and --host change them",
                reason="PORT_TAKEN",
            ) from error
        await self._server.start()
        return bound

    async def ready(self) -> None:
        await self._all(health_pb2.HealthCheckResponse.SERVING)

    async def leaving(self) -> None:
        """NOT_SERVING from here on; calls still work."""
        await self._health.enter_graceful_shutdown()

    async def ended(self) -> None:
        """Returns when the server does not serve any more."""
        # Shielded: gRPC would never stop after a cancelled wait.
        await asyncio.shield(self._server.wait_for_termination())

    async def stop(self, grace: float) -> None:
        """No new calls; those of our services that run get `grace` seconds, then all are cancelled.

        Others, such as watches of the health, may last for ever and are not waited for.
        """
        await self._interceptor.idle(grace)
        await self._server.stop(_FLUSH)

    async def _all(self, status: Any) -> None:
        for name in ("", *NAMES):
            await self._health.set(name, status)
