"""The server below the application."""

import uvicorn
from fastapi import FastAPI

# Longer than clients keep an idle connection (httpx, and with it OpenAI's: 5 s): who closes first must not be the one
# that does not know whether a request is on its way.
IDLE_SECONDS = 30


def server_of(app: FastAPI, drain_seconds: float) -> uvicorn.Server:
    """Serves an application; `run` takes the sockets, and handles the signals.

    Args:
        app: of `make_app`.
        drain_seconds: how long clients may go on reading once it is to stop.
    """
    quiet = {"log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=drain_seconds, **quiet)
    return uvicorn.Server(config)
