"""HTTP gateway of the reward pool for other runs and programs: tokens, lossless bodies, limits, no pickle.

Serve's own ingress could run this application instead of the few lines that start a server here, but its proxies listen
on one host and port for all runs of a cluster, and outlive the run that enabled them.
"""

import asyncio
import hmac
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acpo_dist.config.pool import HttpConfig
from acpo_dist.core.errors import RewardError, UsageError, WorkerError
from acpo_dist.workers.reward.http_wire import MEDIA_TYPE, BodyError, decode_images, decode_sent, encode_answer
from actors.reward.client import NoAnswerError, PoolLink, RewardClient

logger = logging.getLogger(__name__)

_AT_ONCE = 32
"""Concurrent requests; further ones get status 503."""
_IDLE_S = 15.0
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: int
    body: bytes
    media_type: str = "application/json"


class RefusedError(Exception):
    """A request that is rejected with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gateway:
    """The ASGI application. A plain class, which needs no Ray."""

    def __init__(
        self, ask: Callable[[str, str, Any, tuple[str, ...]], Any], metrics: Mapping[str, bool], *, cut: str,
        tokens: tuple[str, ...], max_bytes: int, idle_s: float = _IDLE_S,
    ) -> None:  # fmt: skip
        """Store the pool and the limits.

        Args:
            ask: (metric, `score` or `gradient`, images or `WireTensor`, prompts) -> scores or `ScoredGradient`.
            metrics: name -> whether it has gradients.
            cut: tensor of the gradients: `latent` or `image`.
            tokens: accepted tokens.
            max_bytes: largest body.
            idle_s: seconds without data after which an incomplete request is rejected.
        """
        self._ask, self._metrics, self._cut = ask, dict(metrics), cut
        self._tokens, self._max_bytes = [token.encode() for token in tokens], max_bytes
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="http")
        self._in_flight, self._idle_s = 0, idle_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        try:
            reply = await self._answer(scope, receive)
        except RefusedError as error:
            reply = _json(error.status, {"error": str(error)})
        headers = [(b"content-type", reply.media_type.encode()), (b"content-length", str(len(reply.body)).encode())]
        if reply.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if reply.status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _answer(self, scope: Any, receive: Any) -> Reply:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        # First: without a token, no name, limit or byte of the body is processed.
        self._require_token(headers.get("authorization", b""))
        parts = scope["path"].strip("/").split("/", 2)
        if parts == ["v1", "metrics"]:
            _require_method(scope, "GET")
            rows = [{"name": name, "gradient_at": self._cut if yes else None} for name, yes in self._metrics.items()]
            return _json(200, {"metrics": rows, "max_bytes": self._max_bytes})
        if len(parts) != 3 or parts[0] != "v1" or parts[1] not in ("score", "gradient"):
            raise RefusedError(404, "known paths: GET /v1/metrics, POST /v1/score/METRIC, POST /v1/gradient/METRIC")
        _require_method(scope, "POST")
        self._require_metric(parts[2], parts[1])
        found = headers.get("content-type", b"").decode("latin-1").split(";")[0].strip()
        if found != MEDIA_TYPE:
            raise RefusedError(415, f"Content-Type must be {MEDIA_TYPE}, found `{found}`")
        # Read before it counts as in flight, so that idle clients do not block others.
        body = await self._read(headers, receive)
        if self._in_flight >= _AT_ONCE:
            raise RefusedError(503, f"server busy: {_AT_ONCE} requests in flight; retry later")
        self._in_flight += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, parts[2], parts[1], body)
        finally:
            self._in_flight -= 1

    def _work(self, metric: str, what: str, body: bytes) -> Reply:
        try:
            sent, prompts = decode_images(body) if what == "score" else decode_sent(body)
            answer = self._ask(metric, what, sent, prompts)
        except NoAnswerError as error:
            raise RefusedError(503, str(error)) from error
        except (BodyError, RewardError) as error:
            raise RefusedError(422, str(error)) from error
        if what == "score":
            return _json(200, {"scores": answer})
        return Reply(200, encode_answer(answer), MEDIA_TYPE)

    async def _read(self, headers: Mapping[str, bytes], receive: Any) -> bytes:
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            raise RefusedError(413, self._too_large())
        body = bytearray()
        while True:
            try:
                message = await asyncio.wait_for(receive(), self._idle_s)
            except TimeoutError as error:
                raise RefusedError(408, f"no data for {self._idle_s:g} s, and the body is incomplete") from error
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the connection was closed before the body was complete")
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise RefusedError(413, self._too_large())
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> str:
        return f"a body may have {self._max_bytes / 2**20:g} MiB (rewards.http.max_mib); send fewer images at once"

    def _require_token(self, header: bytes) -> None:
        scheme, _, token = header.partition(b" ")
        # All tokens are compared in full, so that the duration reveals nothing.
        matches = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RefusedError(401, "a valid token is required: Authorization: Bearer TOKEN")

    def _require_metric(self, metric: str, what: str) -> None:
        if metric not in self._metrics:
            raise RefusedError(404, f"no reward or judge has the name `{metric}`; known: {', '.join(self._metrics)}")
        if what == "gradient" and not self._metrics[metric]:
            raise RefusedError(404, f"`{metric}` has no gradient: it is a judge, or not differentiable")


def _require_method(scope: Any, method: str) -> None:
    if scope["method"] != method:
        raise RefusedError(405, f"use {method} here, not {scope['method']}")


def _json(status: int, value: Mapping[str, Any]) -> Reply:
    return Reply(status, json.dumps(value).encode())


def read_tokens(http: HttpConfig) -> tuple[str, ...]:
    """Return the tokens from the environment.

    Raises:
        UsageError: there are none, or one has fewer than 16 characters.
    """
    tokens = tuple(token.strip() for token in os.environ.get(http.token_env, "").split(",") if token.strip())
    if not tokens or min(len(token) for token in tokens) < 16:
        raise UsageError(
            f"rewards.http is enabled, but ${http.token_env} holds "
            f"{'no token' if not tokens else 'a token of fewer than 16 characters'}. Set it to one or more, separated "
            'by commas; `python -c "import secrets; print(secrets.token_urlsafe())"` generates one.'
        )
    return tokens


class GatewayActor:
    """Actor around `Gateway` and its server."""

    def __init__(
        self, link: PoolLink, metrics: Mapping[str, bool], cut: str, http: HttpConfig, tokens: tuple[str, ...]
    ) -> None:
        """Start the server.

        Raises:
            OSError: the address is in use, or does not belong to this machine.
        """
        import uvicorn

        self._client = RewardClient(link)
        gateway = Gateway(self._ask, metrics, cut=cut, tokens=tokens, max_bytes=int(http.max_mib * 2**20))
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((http.host, http.port))
        server = uvicorn.Server(uvicorn.Config(gateway, log_level="warning", lifespan="off", access_log=False))
        threading.Thread(target=server.run, kwargs={"sockets": [self._socket]}, daemon=True, name="http").start()

    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    def _ask(self, metric: str, what: str, sent: Any, prompts: tuple[str, ...]) -> Any:
        if what == "score":
            return self._client.score(metric, ray.put(sent), prompts)
        return self._client.submit(metric, sent, prompts).result()


def open_gateway(link: PoolLink, metrics: Mapping[str, bool], cut: str, http: HttpConfig) -> tuple[Any, str]:
    """Start the gateway on this node; return the actor, which must be kept, and its URL.

    Raises:
        UsageError: no token is set.
        WorkerError: it cannot listen at the configured address.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(GatewayActor)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(link, metrics, cut, http, read_tokens(http))
    )
    try:
        host, port = ray.get(actor.address.remote(), timeout=_START_TIMEOUT_S)
    except RayError as error:
        raise WorkerError(
            f"rewards.http cannot listen on {http.host}:{http.port} (rewards.http.host, rewards.http.port): "
            f"{str(error).strip().splitlines()[-1]}. If another program uses the port, set rewards.http.port=0, which "
            "takes a free one."
        ) from error
    return actor, f"http://{host}:{port}"
