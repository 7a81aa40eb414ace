"""The pool of another run, over HTTP: scores and gradients without Ray. The server side is `actors/gateway.py`."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from acpo_dist.core.errors import RewardError
from acpo_dist.rewards.http_wire import MEDIA_TYPE, decode_answer, encode_pictures, encode_sent
from acpo_dist.rewards.wire import WireTensor
from acpo_dist.rewards.worker import ScoredGradient

_PAUSE_S = 0.5


class RemotePool:
    """Asks a pool by address; what it is too busy for is asked again within the deadline."""

    elsewhere = True

    def __init__(self, url: str, token: str, *, deadline_s: float = 300.0) -> None:
        """Connect to nothing yet.

        Args:
            url: such as `http://127.0.0.1:8765`.
            token: one of those that the server was started with.
        """
        self._url, self._token, self._deadline_s = url.rstrip("/"), token, deadline_s
        self.retries = 0

    def metrics(self) -> list[dict[str, Any]]:
        """Names of the rewards and judges, and whether they give gradients and at what."""
        return json.loads(self._ask("/v1/metrics", None))["metrics"]

    def score(self, metric: str, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Raw scores of uint8 pictures (B, 3, H, W).

        Raises:
            RewardError: what the server says, or none came within the deadline.
        """
        return json.loads(self._ask(f"/v1/score/{metric}", encode_pictures(images, prompts)))["scores"]

    def value_and_grad(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """See `GradientSource.value_and_grad`."""
        return decode_answer(self._ask(f"/v1/gradient/{metric}", encode_sent(sent, prompts)))

    def _ask(self, path: str, body: bytes | None) -> bytes:
        deadline = time.monotonic() + self._deadline_s
        while True:
            request = urllib.request.Request(self._url + path, data=body, method="GET" if body is None else "POST")
            request.add_header("Authorization", f"Bearer {self._token}")
            request.add_header("Content-Type", MEDIA_TYPE)
            try:
                with urllib.request.urlopen(request, timeout=max(0.1, deadline - time.monotonic())) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                text = _message(error)
                if error.code != 503:
                    raise RewardError(f"{self._url}{path}: {error.code}: {text}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                text = str(error)
            if time.monotonic() + _PAUSE_S >= deadline:
                raise RewardError(f"{self._url}{path}: no answer within {self._deadline_s:g} s: {text}")
            self.retries += 1
            time.sleep(_PAUSE_S)


def _message(error: urllib.error.HTTPError) -> str:
    body = error.read()
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
