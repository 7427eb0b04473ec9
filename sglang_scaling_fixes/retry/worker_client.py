"""HTTP to one server: send the request, and turn everything that breaks into a `Failure`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.settings import ProxySettings

KEEP_ALIVE_S = 2.0
"""How long an idle connection to a worker is kept; a stock worker closes it after 5 s."""
READ_AHEAD_BYTES = 1 << 14
"""What a connection reads ahead of a client that reads slowly."""
_OWN_LIMITS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM}
)
"""Errors of connecting that are this machine's, and say nothing of the worker."""


@dataclass(frozen=True)
class WorkerCall:
    """What one server is sent. An answer with a status of `retryable` fails the attempt."""

    url: str
    body: bytes
    retryable: frozenset[int]


class Sessions:
    """Connections to workers. `fresh` never uses one that was used before."""

    def __init__(self, settings: ProxySettings) -> None:
        self.pooled = _session(settings, force_close=False)
        self.fresh = _session(settings, force_close=True)

    async def __aenter__(self) -> Sessions:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pooled.close()
        await self.fresh.close()


def _session(settings: ProxySettings, *, force_close: bool) -> aiohttp.ClientSession:
    """Changes nothing on the way: no cookies, no decompression, no headers of its own."""
    keep: dict[str, Any] = {"force_close": True}
    if not force_close:
        keep = {"keepalive_timeout": KEEP_ALIVE_S}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, **keep),
        timeout=aiohttp.ClientTimeout(
            total=None,
            connect=settings.connect_timeout,
            sock_read=settings.idle_timeout,
        ),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        read_bufsize=READ_AHEAD_BYTES,
        trace_configs=[_noting_reuse()],
    )


class _Connection:
    """What becomes known of a request's connection."""

    def __init__(self) -> None:
        self.reused = False


def _noting_reuse() -> aiohttp.TraceConfig:
    async def reused(_session: object, context: Any, _params: object) -> None:
        if isinstance(context.trace_request_ctx, _Connection):
            context.trace_request_ctx.reused = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reused)
    return trace


class WorkerClient:
    def __init__(self, sessions: Sessions, settings: ProxySettings) -> None:
        self._sessions = sessions
        self._settings = settings

    @contextlib.asynccontextmanager
    async def call(
        self, request: ClientRequest, call: WorkerCall, *, within: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, once its headers have arrived. Raises Failure, also out of the block.

        `within`: so many seconds from now, if that is less than what all requests have.
        """
        response = None
        idle = self._settings.idle_timeout
        # The session's own limits do not cover a worker that never reads the request.
        limit = self._settings.connect_timeout + idle
        limit = limit if within is None else min(limit, within)
        try:
            async with asyncio.timeout(limit):
                response = await self._response(request, call)
            _refuse_encoded(request, response)
            yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if getattr(error, "errno", None) in _OWN_LIMITS:
                words = "the proxy has no socket left for one more request"
                raise Failure(Reason.OWN_LIMIT, words, detail=_words(error)) from None
            raise Failure(
                Reason.REFUSED, "no connection to the worker", detail=_words(error)
            ) from None
        except TimeoutError:
            silent = idle if response is not None else min(limit, idle)
            raise Failure(Reason.TIMEOUT, f"the worker sent no byte for {silent:g} s") from None
        except aiohttp.ClientResponseError as error:
            raise Failure(
                Reason.UNREADABLE, "the worker does not speak HTTP", detail=error.message
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failure(
                Reason.LOST, "the connection to the worker broke", detail=_words(error)
            ) from None
        finally:
            if response is not None:
                # A response that was read to its end has returned its connection already.
                response.close()

    async def _response(self, request: ClientRequest, call: WorkerCall) -> aiohttp.ClientResponse:
        """A kept connection may be closed by the worker just now. That is no sign of its health."""
        connection = _Connection()
        try:
            return await self._send(self._sessions.pooled, request, call, connection)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if not connection.reused or isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._send(self._sessions.fresh, request, call, connection)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        request: ClientRequest,
        call: WorkerCall,
        connection: _Connection,
    ) -> aiohttp.ClientResponse:
        return await session.request(
            request.method,
            URL(call.url + request.target, encoded=True),
            headers=request.headers,
            data=call.body or None,
            allow_redirects=False,
            trace_request_ctx=connection,
        )


def _refuse_encoded(request: ClientRequest, response: aiohttp.ClientResponse) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if request.method in ("POST", "PUT") and encoding != "identity":
        raise Failure(
            Reason.UNREADABLE, f"the worker answered in {encoding!r}, which was not asked for"
        )


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
