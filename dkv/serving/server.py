"""The HTTP interface: OpenAI's, as far as it goes, in front of a `Worker`."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.exceptions import HTTPException

from dkv.serving.answer import Answer, refusal_of
from dkv.serving.gaps import asked_gaps
from dkv.serving.llm import LLM
from dkv.serving.metrics import Metrics
from dkv.serving.page import page
from dkv.serving.protocol import Asked, Served, asked, fields_of
from dkv.serving.replies import Refusal, Reply, event
from dkv.serving.worker import Worker, describe

# What is beyond the largest body is read and dropped up to so many times its size, so that the client hears why.
DROPPED = 8
# A body that has not come by then is not waited for: it would hold its connection for ever.
BODY_SECONDS = 60


def make_app(llm: LLM, served: Served, *, max_waiting: int = 64, api_key: str | None = None) -> FastAPI:
    """The application; its worker runs from its start to its end.

    Args:
        llm: that nobody else uses.
        served: how clients see it.
        max_waiting: requests that there may be beyond the rows of `llm`.
        api_key: that clients have to name; None: they need none.
    """
    server = _Server(llm, served, max_waiting, api_key)
    app = FastAPI(lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_api_route("/", server.page, methods=["GET", "HEAD"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.counts, methods=["GET"])
    for path, answer, method in (
        ("/v1/models", server.models, "GET"),
        ("/v1/models/{name:path}", server.model, "GET"),
        ("/v1/chat/completions", server.chat, "POST"),
        ("/v1/completions", server.complete, "POST"),
        ("/v1/infill", server.infill, "POST"),
    ):
        app.add_api_route(path, server.guarded(answer), methods=[method], response_model=None)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return _refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    return app


class _Server:
    """What the routes do."""

    def __init__(self, llm: LLM, served: Served, max_waiting: int, api_key: str | None):
        self.served, self._llm, self._max_waiting = served, llm, max_waiting
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._created = int(time.time())
        self._page = page(served, has_key=api_key is not None)
        # One thread: a tokenizer is not made for several at a time.
        self._checking = ThreadPoolExecutor(1, "dkv-checks")
        self._watching: set[asyncio.Task] = set()
        self.worker: Worker
        self.metrics: Metrics

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker = Worker(self._llm, self._max_waiting)
        self.metrics = Metrics(self.worker)
        self.worker.on_end = self.metrics.note_end
        yield
        # All connections are closed by now: nobody reads what is still open.
        await asyncio.to_thread(self.worker.stop)
        self._checking.shutdown()

    def guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route that asks for the key, and tells errors in OpenAI's form."""

        async def route(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await answer(request)
            except Exception as error:
                response = _refused(refusal_of(error))
            self.metrics.note_response(request.scope["route"].path, response.status_code)
            return response

        return route

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    async def page(self) -> Response:
        text, headers = self._page
        return HTMLResponse(text, headers=headers)

    async def health(self) -> Response:
        told = describe(self.worker)
        return _json({**told, "model": self.served.name}, 200 if told["status"] == "ok" else 503)

    async def counts(self) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.kind)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.served.name:
            raise Refusal(404, f"this server has {self.served.name!r}", "model", "model_not_found")
        return _json(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"object": "model", "created": self._created, "owned_by": "dkv"}
        return {"id": self.served.name, **about, "max_model_len": self.served.max_length}

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, "talk", partial(asked, chat=True))

    async def complete(self, request: Request) -> Response:
        return await self._answered(request, "prompt", partial(asked, chat=False))

    async def infill(self, request: Request) -> Response:
        return await self._answered(request, "infill", asked_gaps)

    async def _answered(self, request: Request, kind: str, check: Callable[..., Asked]) -> Response:
        try:
            body = await asyncio.wait_for(_body(request, self.served.max_body), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body has not come within {BODY_SECONDS} seconds") from None
        loop = asyncio.get_running_loop()
        wanted = await loop.run_in_executor(self._checking, lambda: check(fields_of(body), served=self.served))
        answer = Answer(self.worker, wanted, self.served)
        self._watch(request, answer)
        try:
            await answer.taken()
            reply = Reply(self.served.name, kind, wanted.usage)
            if wanted.stream:
                told = _events(answer, reply)
                return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            async for _ in answer.pieces():
                pass
        except Exception:
            # One choice failed: the others are nobody's.
            answer.leave()
            raise
        return _json(reply.whole(answer.written, answer.usage))

    def _watch(self, request: Request, answer: Answer) -> None:
        """Cancel an answer when its client leaves."""

        async def watch() -> None:
            # The end of the response is told in the same way.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            answer.leave()

        task = asyncio.create_task(watch())
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)


async def _events(answer: Answer, reply: Reply) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    try:
        for number in range(len(answer.written)):
            if (begin := reply.begin(number)) is not None:
                yield begin
        async for number, text, finish, draft in answer.pieces():
            yield reply.piece(number, text, finish, draft)
        yield reply.end(answer.usage)
    except Exception as error:
        answer.leave()
        yield event(refusal_of(error).body())


async def _body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: it has more bytes than `most`, or is not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another site could send anything else from a browser.
    if kind != "application/json":
        raise Refusal(415, "send the body as JSON, with Content-Type: application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > DROPPED * most:
            break
    if size > most:
        raise Refusal(413, f"the body has more than {most} bytes", code="body_too_large")
    return b"".join(parts)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), status, headers, "application/json")


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.body(), refusal.status, refusal.headers)
