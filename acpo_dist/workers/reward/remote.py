"""Client of another run's reward pool over HTTP, without Ray."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from acpo_dist.core.errors import RewardError
from acpo_dist.workers.reward.http_wire import MEDIA_TYPE, decode_answer, encode_images, encode_sent
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient

_PAUSE_S = 0.5


class RemotePool:
    """Requests to a pool by URL; if the server is busy or unreachable, they are repeated until the deadline."""

    def __init__(self, url: str, token: str, *, deadline_s: float = 300.0) -> None:
        """Store the address; the first request connects.

        Args:
            url: address, such as `http://127.0.0.1:8765`.
            token: one of the server's tokens.
            deadline_s: seconds after which a request fails.
        """
        self._url, self._token, self._deadline_s = url.rstrip("/"), token, deadline_s
        self._max_bytes: float | None = None
        """Largest body that the server accepts; None before the first request."""
        self.retries = 0

    def metrics(self) -> list[dict[str, Any]]:
        """Return rewards and judges: `name`, and `gradient_at` (`latent`, `image` or None)."""
        return json.loads(self._ask("/v1/metrics", None))["metrics"]

    def score(self, metric: str, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Return raw scores of uint8 images (B, 3, H, W).

        Raises:
            RewardError: the server's message, or no response within the deadline.
        """
        return json.loads(self._ask(f"/v1/score/{metric}", encode_images(images, prompts)))["scores"]

    def value_and_grad(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """Return raw scores of x0-hat (B, C, h, w) or pixels (B, 3, H, W), by the server's cut, and their gradient.

        Raises:
            RewardError: the server's message, or no response within the deadline.
        """
        return decode_answer(self._ask(f"/v1/gradient/{metric}", encode_sent(sent, prompts)))

    def _ask(self, path: str, body: bytes | None) -> bytes:
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                if body is not None:
                    self._require_room(len(body), deadline)
                return self._send(path, body, deadline)
            except urllib.error.HTTPError as error:
                text = _message(error)
                if error.code != 503:
                    raise RewardError(f"{self._url}{path}: {error.code}: {text}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                text = str(error)
                # Another server may listen at this address next time.
                self._max_bytes = None
            if time.monotonic() + _PAUSE_S >= deadline:
                raise RewardError(f"{self._url}{path}: no response within {self._deadline_s:g} s: {text}")
            self.retries += 1
            time.sleep(_PAUSE_S)

    def _send(self, path: str, body: bytes | None, deadline: float) -> bytes:
        request = urllib.request.Request(self._url + path, data=body, method="GET" if body is None else "POST")
        request.add_header("Authorization", f"Bearer {self._token}")
        request.add_header("Content-Type", MEDIA_TYPE)
        with urllib.request.urlopen(request, timeout=max(0.1, deadline - time.monotonic())) as answer:
            return answer.read()

    def _require_room(self, count: int, deadline: float) -> None:
        """Get the server's limit and check the token before a body is sent.

        A server that rejects a body closes the connection, and its message may be lost.
        """
        limit = self._max_bytes
        if limit is None:
            limit = json.loads(self._send("/v1/metrics", None, deadline)).get("max_bytes", math.inf)
            self._max_bytes = limit
        if count > limit:
            raise RewardError(
                f"{self._url}: 413: the request has {count / 2**20:.3g} MiB, the server accepts {limit / 2**20:.3g} "
                "(rewards.http.max_mib of its run); send fewer images per request"
            )


def _message(error: urllib.error.HTTPError) -> str:
    body = error.read()
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
