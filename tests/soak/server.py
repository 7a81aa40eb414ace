"""An MLflow server behind a relay: it can be killed and started again, and its connections can be closed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

from tests.helpers.runs import results

START_S = 120.0
_CHUNK = 1 << 16


class TrackingServer:
    """A real MLflow server on a free port of this machine, reached through a relay on another.

    Args:
        folder: folder of its database, artefacts and output; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._port = folder, _free_port()
        self._process: subprocess.Popen | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closing_until = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.start()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        """Address of the relay."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Start the server unless it lives, continue it if it was stopped, and wait until it answers.

        Raises:
            TimeoutError: it did not answer in `START_S` seconds.
        """
        if self._process is not None:
            self.signal(signal.SIGCONT)
            return
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", self._folder / "files",
        ]  # fmt: skip
        with (self._folder / "server.txt").open("a") as output:
            # Its job queue would leave a folder in /dev/shm when it is killed.
            variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=variables, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                return
            time.sleep(0.2)
        raise TimeoutError(f"the MLflow server did not answer in {START_S:g} s: {self._folder / 'server.txt'}")

    def kill(self) -> None:
        """Kill the server and its workers."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def close_connections(self, seconds: float) -> None:
        """Reset all connections, and every new one for some seconds."""
        self._closing_until = time.monotonic() + seconds
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _reset(end)

    def close(self) -> None:
        """Stop server and relay."""
        self._listener.close()
        self.close_connections(0)
        self.kill()

    def missing(self, folder: Path) -> list[str]:
        """Metrics of a finished run folder that the server does not have exactly once per iteration."""
        import mlflow

        client = mlflow.MlflowClient(f"http://127.0.0.1:{self._port}")
        runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
        if len(runs) != 1:
            return [f"{len(runs)} runs in MLflow, expected 1"]
        problems = []
        rows = results(folder)
        for name in ("drift/rms", "reward/two_stream/mean"):
            found = [one.step for one in client.get_metric_history(runs[0].info.run_id, name)]
            expected = [row["iteration"] for row in rows if name in row]
            if sorted(found) != expected:
                problems.append(f"{name} in MLflow at iterations {sorted(found)}, expected {expected}")
        return problems

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._closing_until:
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                client.close()
                continue
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK):
            sink.sendall(chunk)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        # Linger of 0 s: the other side sees a reset, and not an orderly end.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]
