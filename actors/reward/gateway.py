"""The pool's door for other runs and programs: HTTP with tokens, lossless bodies, limits, and no pickle."""

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
"""Requests that are answered at once; more are told to come again."""
_IDLE_S = 15.0
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    body: bytes
    media_type: str = "application/json"


class RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Door:
    """The ASGI application. A plain class: it needs something to ask, but no Ray."""

    def __init__(
        self, ask: Callable[[str, str, Any, tuple[str, ...]], Any], metrics: Mapping[str, bool], *, cut: str,
        tokens: tuple[str, ...], max_bytes: int, idle_s: float = _IDLE_S,
    ) -> None:  # fmt: skip
        """Prepare to answer.

        Args:
            ask: (metric, `score` or `gradient`, images or what was sent, prompts) -> scores or `ScoredGradient`.
            metrics: name -> whether it gives gradients.
            cut: what gradients are asked at: `latent` or `image`.
            tokens: those who hold one are let in.
            idle_s: how long a client may send nothing while its request is not whole.
        """
        self._ask, self._metrics, self._cut = ask, dict(metrics), cut
        self._tokens, self._max_bytes = [token.encode() for token in tokens], max_bytes
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="http")
        self._under_way, self._idle_s = 0, idle_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
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
        # Before anything else: a stranger learns neither names nor limits, and no byte of the body is read.
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
        # Before it counts as under way: clients that send nothing more must not keep others out.
        body = await self._read(headers, receive)
        if self._under_way >= _AT_ONCE:
            raise RefusedError(503, f"{_AT_ONCE} requests are under way: come again")
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, parts[2], parts[1], body)
        finally:
            self._under_way -= 1

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
                raise RefusedError(408, f"nothing came for {self._idle_s:g} s and the body is not whole") from error
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the connection was closed before the body was whole")
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise RefusedError(413, self._too_large())
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> str:
        return f"a body may have {self._max_bytes / 2**20:g} MiB (rewards.http.max_mib); send fewer images at once"

    def _require_token(self, header: bytes) -> None:
        scheme, _, token = header.partition(b" ")
        # Every token is compared in full, so that the time taken tells nothing.
        matches = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RefusedError(401, "a valid token is needed: Authorization: Bearer TOKEN")

    def _require_metric(self, metric: str, what: str) -> None:
        if metric not in self._metrics:
            raise RefusedError(404, f"no reward or judge is called `{metric}`; known: {', '.join(self._metrics)}")
        if what == "gradient" and not self._metrics[metric]:
            raise RefusedError(404, f"`{metric}` gives scores only: it is a judge, or has no gradient")


def _require_method(scope: Any, method: str) -> None:
    if scope["method"] != method:
        raise RefusedError(405, f"use {method} here, not {scope['method']}")


def _json(status: int, value: Mapping[str, Any]) -> Reply:
    return Reply(status, json.dumps(value).encode())


def read_tokens(http: HttpConfig) -> tuple[str, ...]:
    """Tokens from the environment.

    Raises:
        UsageError: there are none, or one is short enough to be guessed.
    """
    tokens = tuple(token.strip() for token in os.environ.get(http.token_env, "").split(",") if token.strip())
    if not tokens or min(len(token) for token in tokens) < 16:
        raise UsageError(
            f"rewards.http is enabled, but ${http.token_env} holds "
            f"{'no token' if not tokens else 'a token of fewer than 16 characters'}. Set it to one or more, separated "
            'by commas; `python -c "import secrets; print(secrets.token_urlsafe())"` makes one.'
        )
    return tokens


class GatewayActor:
    """Shell round `Door` and its server."""

    def __init__(
        self, link: PoolLink, metrics: Mapping[str, bool], cut: str, http: HttpConfig, tokens: tuple[str, ...]
    ) -> None:
        """Listen.

        Raises:
            OSError: the address is taken or not ours.
        """
        import uvicorn

        self._client = RewardClient(link)
        door = Door(self._ask, metrics, cut=cut, tokens=tokens, max_bytes=int(http.max_mib * 2**20))
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((http.host, http.port))
        server = uvicorn.Server(uvicorn.Config(door, log_level="warning", lifespan="off", access_log=False))
        threading.Thread(target=server.run, kwargs={"sockets": [self._socket]}, daemon=True, name="http").start()

    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    def _ask(self, metric: str, what: str, sent: Any, prompts: tuple[str, ...]) -> Any:
        if what == "score":
            return self._client.score(metric, ray.put(sent), prompts)
        return self._client.submit(metric, sent, prompts).result()


def open_gateway(link: PoolLink, metrics: Mapping[str, bool], cut: str, http: HttpConfig) -> tuple[Any, str]:
    """Start the door on this node; returns the actor, which is to be kept, and its address.

    Raises:
        UsageError: no token is set.
        WorkerError: it cannot listen there.
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
            f"{str(error).strip().splitlines()[-1]}"
        ) from error
    return actor, f"http://{host}:{port}"
