"""HTTP to one server: send the request, and turn everything that breaks into a `Failure`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from yarl import URL

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.settings import ProxySettings

KEEP_ALIVE_S = 2.0
"""How long an idle connection to a worker is kept; a stock worker closes it after 5 s."""


@dataclass(frozen=True)
class WorkerCall:
    """What one server is sent. An answer with a status of `retryable` fails the attempt."""

    url: str
    body: bytes
    retryable: frozenset[int]


def new_session(settings: ProxySettings) -> aiohttp.ClientSession:
    """Changes nothing on the way: no cookies, no decompression, no headers of its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(
            total=None,
            connect=settings.connect_timeout,
            sock_read=settings.idle_timeout,
        ),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


class WorkerClient:
    def __init__(self, session: aiohttp.ClientSession, settings: ProxySettings) -> None:
        self._session = session
        self._settings = settings

    @contextlib.asynccontextmanager
    async def call(
        self, request: ClientRequest, call: WorkerCall
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, once its headers have arrived. Raises Failure, also out of the block."""
        response = None
        try:
            # The session's own limits do not cover a worker that never reads the request.
            async with asyncio.timeout(
                self._settings.connect_timeout + self._settings.idle_timeout
            ):
                response = await self._session.request(
                    request.method,
                    URL(call.url + request.target, encoded=True),
                    headers=request.headers,
                    data=call.body or None,
                    allow_redirects=False,
                )
            _refuse_encoded(request, response)
            yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Failure(
                Reason.REFUSED, "no connection to the worker", detail=_words(error)
            ) from None
        except TimeoutError:
            idle = self._settings.idle_timeout
            raise Failure(Reason.TIMEOUT, f"the worker sent no byte for {idle:g} s") from None
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


def _refuse_encoded(request: ClientRequest, response: aiohttp.ClientResponse) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if request.method in ("POST", "PUT") and encoding != "identity":
        raise Failure(
            Reason.UNREADABLE, f"the worker answered in {encoding!r}, which was not asked for"
        )


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
