"""The application, which `serve run` and Serve's files name as ``lightllmd.ray_serve.application:build``."""

from __future__ import annotations

import logging
import os
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.ray_serve import arguments
from lightllmd.ray_serve.daemon import checked
from lightllmd.ray_serve.replica import Replica

log = logging.getLogger("ray.serve")


class Deployment:
    """A replica as Serve runs it."""

    async def __init__(self, file: str | None, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # as Serve has it
        self._replica = Replica(file, settings, on_lost=_end_with_it)
        await self._replica.start()

    async def __call__(self, request: Request) -> Response:
        return await self._replica(request)

    async def check_health(self) -> None:
        """As `Replica.check_health`; Serve replaces a replica that fails it three times."""
        await self._replica.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.stop()


def _end_with_it(code: int) -> None:
    """Serve sees a dead replica at once, and would route to one that only says it is unhealthy for seconds more."""
    log.error("lightllmd ended with exit code %d; this replica ends with it", code)
    os._exit(1)


def build(given: dict[str, Any]) -> serve.Application:
    """An application whose replicas are daemons. Raises ConfigInvalid before anything is started."""
    asked = arguments.read(given)
    config = checked(asked.config, asked.settings)
    supervisor = config.supervisor
    deployment = serve.deployment(
        name="lightllmd",
        ray_actor_options={"num_cpus": asked.num_cpus, "num_gpus": arguments.gpus(asked, config)},
        max_ongoing_requests=asked.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": asked.min_replicas,
            "max_replicas": asked.max_replicas,
            "target_ongoing_requests": asked.target_ongoing_requests,
            "upscale_delay_s": asked.upscale_delay_s,
            "downscale_delay_s": asked.downscale_delay_s,
        },
        # Serve waits for what is in flight, then the daemon ends.
        graceful_shutdown_timeout_s=supervisor.drain_timeout + supervisor.stop_timeout + supervisor.abort_grace + 5,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )(Deployment)
    return deployment.bind(asked.config, asked.settings)
