"""The pool over HTTP: the numbers of one process, and a clear rejection of invalid requests."""

import http.client
import json
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
import uvicorn

from acpo_dist.config.pool import HttpConfig
from acpo_dist.core.errors import RewardError, UsageError
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.rewards.metrics import StridedJudgeMetric, TwoStreamMetric
from acpo_dist.workers.reward.http_wire import MEDIA_TYPE, encode_images
from acpo_dist.workers.reward.remote import RemotePool
from acpo_dist.workers.reward.wire import WireTensor, pack, unpack
from acpo_dist.workers.reward.worker import RewardWorker

pytestmark = pytest.mark.ray
TOKEN, OTHER = "a-token-of-some-length", "another-token-of-some-length"
MAX_BYTES = 200_000
METRICS = {"two_stream": True, "strided_judge": False}


@pytest.fixture(scope="module")
def workers() -> dict[str, RewardWorker]:
    model = SdxlFamily.Config(path="toy-sdxl")
    return {
        "two_stream": RewardWorker(TwoStreamMetric.Config(), model=model, cut="latent", wire_dtype="float16"),
        "strided_judge": RewardWorker(StridedJudgeMetric.Config(), model=None, cut="latent", wire_dtype="float16"),
    }


@pytest.fixture(scope="module")
def port(workers):
    """The gateway on a real server, with the workers of this process instead of the pool."""
    from actors.reward.client import NoAnswerError
    from actors.reward.gateway import Gateway

    def ask(metric, what, sent, prompts):
        if prompts[0] == "a prompt without a replica":
            raise NoAnswerError("no replica answers")
        return (
            workers[metric].score(sent, prompts) if what == "score" else workers[metric].value_and_grad(sent, prompts)
        )

    with serving(Gateway(ask, METRICS, cut="latent", tokens=(OTHER, TOKEN), max_bytes=MAX_BYTES)) as number:
        yield number


@contextmanager
def serving(door):
    """Start a gateway on a real server and return its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        server = uvicorn.Server(uvicorn.Config(door, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def pool(port) -> RemotePool:
    return RemotePool(f"http://127.0.0.1:{port}", TOKEN, deadline_s=120)


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return (torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def ask(port: int, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> tuple[int, dict, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": MEDIA_TYPE}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=body, headers={name: value for name, value in sent.items() if value})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), dict(answer.getheaders())


def test_scores_over_http_are_those_of_the_worker_to_the_last_bit(pool, workers):
    assert pool.score("two_stream", images(), ["", "", ""]) == workers["two_stream"].score(images(), ["", "", ""])


@pytest.mark.parametrize("wire_dtype", ["float16", "float32"])
def test_gradients_over_http_are_those_of_the_worker_to_the_last_bit(wire_dtype: str, pool, workers):
    sent = pack(1e-6 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), wire_dtype)
    found = pool.value_and_grad("two_stream", sent, ["", ""])
    wanted = workers["two_stream"].value_and_grad(sent, ["", ""])
    assert found.scores == wanted.scores
    assert (
        found.gradient.data == wanted.gradient.data
    ).all() and found.gradient.data.dtype == wanted.gradient.data.dtype
    assert (found.gradient.exponent == wanted.gradient.exponent).all()


def test_the_listing_states_which_metrics_have_gradients_and_at_which_tensor(pool):
    assert pool.metrics() == [
        {"name": "two_stream", "gradient_at": "latent"},
        {"name": "strided_judge", "gradient_at": None},
    ]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
@pytest.mark.parametrize("path", ["/v1/metrics", "/v1/score/two_stream", "/anything"])
def test_requests_without_a_token_reveal_nothing(header: str, path: str, port):
    status, answer, headers = ask(port, path, b"body", Authorization=header)
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert answer == {"error": "a valid token is required: Authorization: Bearer TOKEN"}


def test_each_of_several_tokens_opens(port):
    assert ask(port, "/v1/metrics", method="GET", Authorization=f"Bearer {OTHER}")[0] == 200


def body(images: torch.Tensor, prompts: list[str]) -> bytes:
    return encode_images(images, prompts)


def gradient_body(**changes) -> bytes:
    from safetensors.torch import save

    tensors = {"data": torch.zeros(2, 4, 8, 8), "exponent": torch.zeros(2, dtype=torch.int16)} | changes
    return save({name: value for name, value in tensors.items() if value is not None}, {"prompts": '["", ""]'})


@pytest.mark.parametrize(
    ("path", "content", "status", "text"),
    [
        (
            "/v1/score/twostream",
            b"",
            404,
            "no reward or judge has the name `twostream`; known: two_stream, strided_judge",
        ),
        ("/v2/score/two_stream", b"", 404, "known paths"),
        ("/v1/score/two_stream", b"", 422, "not in the safetensors format"),
        ("/v1/score/two_stream", b"\x80\x04\x95pickle", 422, "not in the safetensors format"),
        ("/v1/score/two_stream", b"\xff" * 64, 422, "not in the safetensors format"),
        ("/v1/score/two_stream", body(images(), [""]), 422, r"one text per image \(3\), found 1"),
        ("/v1/score/two_stream", body(images().float(), [""] * 3), 422, "must be uint8 RGB .*, found float32"),
        ("/v1/score/two_stream", body(images()[:, :1], [""] * 3), 422, r"found uint8 of shape \(3, 1, 32, 32\)"),
        ("/v1/score/two_stream", body(images()[:0], []), 422, r"found uint8 of shape \(0, 3, 32, 32\)"),
        ("/v1/score/two_stream", body(images(1), ["x" * 5000]), 422, "a prompt has 5000 characters"),
        ("/v1/gradient/strided_judge", gradient_body(), 404, "has no gradient"),
        (
            "/v1/gradient/two_stream",
            gradient_body(exponent=None),
            422,
            "must hold the tensors data, exponent, found data",
        ),
        ("/v1/gradient/two_stream", gradient_body(exponent=torch.zeros(2)), 422, "`exponent` must be int16"),
        ("/v1/gradient/two_stream", gradient_body(data=torch.zeros(2, 4, 8, 8).double()), 422, "float16 or float32"),
        ("/v1/gradient/two_stream", gradient_body(data=torch.full((2, 4, 8, 8), torch.nan)), 422, "not finite"),
        ("/v1/score/two_stream", body(images(1), ["a prompt without a replica"]), 503, "no replica answers"),
        ("/v1/score/two_stream", b"0" * (MAX_BYTES + 1), 413, "rewards.http.max_mib"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(path: str, content: bytes, status: int, text: str, port):
    import re

    found, answer, headers = ask(port, path, content)
    assert found == status and re.search(text, answer["error"]), answer
    assert ("retry-after" in headers) == (status == 503)


def test_wrong_methods_and_types_are_refused(port):
    assert ask(port, "/v1/metrics")[0] == 405
    assert ask(port, "/v1/score/two_stream", method="GET")[0] == 405
    status, answer, _ = ask(port, "/v1/score/two_stream", b"{}", Content_Type="application/json")
    assert status == 415 and MEDIA_TYPE in answer["error"]


def test_a_body_that_hides_its_size_is_cut_off_at_the_limit(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest("POST", "/v1/score/two_stream")
    for name, value in (("Authorization", f"Bearer {TOKEN}"), ("Content-Type", MEDIA_TYPE)):
        connection.putheader(name, value)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(50):
            connection.send(b"2710\r\n" + b"0" * 10_000 + b"\r\n")
        connection.send(b"0\r\n\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert connection.getresponse().status == 413


def test_the_client_retries_while_the_pool_is_busy_and_fails_at_the_deadline(port):
    impatient = RemotePool(f"http://127.0.0.1:{port}", TOKEN, deadline_s=1.2)
    with pytest.raises(RewardError, match=r"1\.2 s: no replica answers"):
        impatient.score("two_stream", images(1), ["a prompt without a replica"])
    assert impatient.retries >= 1


def test_the_clients_errors_quote_the_server(pool):
    with pytest.raises(RewardError, match="404: no reward or judge has the name `absent`"):
        pool.score("absent", images(), [""] * 3)
    with pytest.raises(RewardError, match=r"422: .*one text per image"):
        pool.value_and_grad("two_stream", WireTensor(*_zeros()), [""])


@pytest.mark.parametrize(("token", "text"), [(TOKEN, r"413: the request has 16 MiB, the server accepts 0\.191"),
                                            (TOKEN + "x", "401: a valid token is required")])  # fmt: skip
def test_a_large_request_is_rejected_at_once_with_the_reason(token: str, text: str, port):
    pool = RemotePool(f"http://127.0.0.1:{port}", token, deadline_s=120)
    with pytest.raises(RewardError, match=text):
        pool.score("two_stream", torch.zeros(64, 3, 296, 296, dtype=torch.uint8), [""] * 64)
    assert pool.retries == 0


def test_clients_that_stall_in_a_body_do_not_block_others_and_time_out():
    from actors.reward.gateway import Gateway

    door = Gateway(lambda metric, what, sent, prompts: [0.5] * len(sent), METRICS, cut="latent", tokens=(TOKEN,),
                max_bytes=MAX_BYTES, idle_s=3)  # fmt: skip
    with serving(door) as port, ExitStack() as stack:
        head = (
            f"POST /v1/score/two_stream HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: 1000\r\n\r\nabc"
        )
        stalled = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(40)]
        for one in stalled:
            one.sendall(head.encode())
        pool = RemotePool(f"http://127.0.0.1:{port}", TOKEN, deadline_s=120)
        assert pool.score("two_stream", images(1), [""]) == [0.5]
        assert pool.retries == 0
        assert all(one.recv(20).startswith(b"HTTP/1.1 408 ") for one in stalled)


def _zeros():
    import numpy as np

    return np.zeros((2, 4, 8, 8), np.float16), np.zeros(2, np.int16)


@pytest.mark.parametrize(("value", "text"), [("", "no token"), ("short", "fewer than 16"), (f"{TOKEN},x", "fewer")])
def test_the_gateway_does_not_start_without_tokens_of_sufficient_length(value: str, text: str, monkeypatch):
    from actors.reward.gateway import read_tokens

    monkeypatch.setenv("ACPO_REWARDS_TOKEN", value)
    with pytest.raises(UsageError, match=text):
        read_tokens(HttpConfig(enabled=True))


def test_tokens_are_read_from_the_environment(monkeypatch):
    from actors.reward.gateway import read_tokens

    monkeypatch.setenv("POOL_TOKENS", f" {TOKEN}, {OTHER} ,")
    assert read_tokens(HttpConfig(enabled=True, token_env="POOL_TOKENS")) == (TOKEN, OTHER)


# In front of a real pool


def test_in_front_of_a_real_pool_scores_and_gradients_are_those_of_a_worker_here(cluster, workers, monkeypatch):
    from acpo_dist.config.load import load_config
    from actors.reward.gateway import open_gateway
    from actors.reward.pool import deploy
    from tests.conftest import TINY

    monkeypatch.setenv("ACPO_REWARDS_TOKEN", TOKEN)
    http_config = HttpConfig(enabled=True, port=0)
    config = load_config("toy_sdxl", [*TINY, "rewards.cpus_per_replica=0.25"])
    with ExitStack() as stack:
        served = deploy(config, "gateway-test")
        stack.callback(served.close)
        gateway, address = open_gateway(
            served.link, {"two_stream": True, "strided_judge": False}, config.rewards.cut, http_config
        )
        stack.callback(cluster.kill, gateway)
        remote = RemotePool(address, TOKEN, deadline_s=300)
        images_BCHW, prompts = images(5), [""] * 5
        for name in ("two_stream", "strided_judge"):
            wanted = workers[name].score(images_BCHW, prompts)
            assert remote.score(name, images_BCHW, prompts) == pytest.approx(wanted, abs=1e-4)
            # The same pool by the loop's own door for images that no rollout made.
            assert served.score_images(name, images_BCHW) == pytest.approx(wanted, abs=1e-4)
        sent = pack(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "float16")
        found = remote.value_and_grad("two_stream", sent, ["", "", ""])
        wanted = workers["two_stream"].value_and_grad(sent, ["", "", ""])
        assert found.scores == pytest.approx(wanted.scores, abs=1e-4)
        error = (unpack(found.gradient) - unpack(wanted.gradient)).norm() / unpack(wanted.gradient).norm()
        assert float(error) < 2e-3  # one step of float16 at either end
        with pytest.raises(RewardError, match="401"):
            RemotePool(address, OTHER, deadline_s=10).score("two_stream", images_BCHW, prompts)
