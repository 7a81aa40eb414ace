"""Ray's Python workers as forks of one process that has imported their libraries.

A worker imports torch, diffusers and Ray for several CPU seconds, and tests start hundreds of workers. `serving()`
starts a server that imports these once, and gives the path of a program that takes the place of `sys.executable` in
`ray.init`: it runs Ray's worker scripts, and those that `driver` writes, in a fork of the server, and everything else
in the real interpreter. A fork has the arguments, environment, folder and streams of the program, its exit status is
the program's, signals reach it, and it is killed when the program is. Programs wait until the server has imported.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

DRIVER = "forked_driver.py"
SCRIPTS = ("setup_worker.py", "default_worker.py", DRIVER)
"""Ray starts the first one, which executes the second one with the same interpreter; the third is that of `driver`."""
SOCKET = "fork.sock"
MODULES = (
    "acpo_dist.cli.commands", "acpo_dist.training.local", "acpo_dist.workers.learner.zero", "deepspeed", "pandas",
    "fastapi", "uvicorn", "grpc", "aiohttp",
)  # fmt: skip
"""Not Ray, which takes its job from the environment when it is imported."""
LARGEST = 1 << 20
"""Bytes of one request: arguments and environment."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """Start the server, and give the path of the program and the server's process id; its children are the forks.

    The server ends with the context. It may still be importing: see `wait_until_ready`.
    """
    address, program = folder / SOCKET, folder / "python"
    program.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from forked import main\nmain({sys.executable!r}, {str(address)!r})\n"
    )
    program.chmod(0o700)
    # Bound here, so that programs can connect at once.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen(64)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.forked", str(listener.fileno()), str(program)],
        cwd=Path(__file__).parents[2], pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL,
        # As workers without a GPU set them, before they import torch and DeepSpeed.
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    listener.close()
    try:
        yield str(program), server.pid
    finally:
        server.kill()
        server.wait()


def wait_until_ready(program: str) -> None:
    """Return once the server behind a program has imported.

    Raises:
        OSError: the server has ended.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(str(Path(program).with_name(SOCKET)))
        # An empty request.
        channel.shutdown(socket.SHUT_WR)
        if channel.recv(64) != b"ready":
            raise ConnectionError("the fork server ended while it imported")


def driver(program: str, folder: Path, code: str) -> list[str]:
    """Return the command that executes code, with the folder of this project on its path, as a fork of the server."""
    script = folder / DRIVER
    script.write_text(f"import sys\nsys.path.insert(1, {str(Path(__file__).parents[2])!r})\n{code}\n")
    return [program, str(script)]


def module(program: str, folder: Path, name: str) -> list[str]:
    """Return the command `python -m name` as a fork of the server."""
    return driver(program, folder, f"import runpy\nrunpy.run_module({name!r}, run_name='__main__')")


def acpo(program: str, folder: Path) -> list[str]:
    """Return the command `acpo` as a fork of the server."""
    return module(program, folder, "acpo_dist")


def main(real: str, address: str) -> None:
    """Run `sys.argv` as the program."""
    arguments = sys.argv[1:]
    # `-u`, and options of the interpreter before a script of Ray, have no effect on a worker.
    script = next((index for index, one in enumerate(arguments) if not one.startswith("-")), None)
    if script is None or Path(arguments[script]).name not in SCRIPTS:
        os.execv(real, [real, *arguments])
    request = {"argv": arguments[script:], "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
        channel.connect(address)
        socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2])
        child = int(channel.recv(64))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = os.waitstatus_to_exitcode(int(channel.recv(64)))
    if status < 0:
        # SIGKILL has no handler to reset.
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _serve(descriptor: str, program: str) -> None:
    """Answer requests until the process is killed."""
    listener = socket.socket(fileno=int(descriptor))
    gc.disable()
    from acpo_dist.core.packages import leave_out_bitsandbytes

    leave_out_bitsandbytes()
    for name in MODULES:
        # An extra may be missing; a worker that needs it says so itself.
        with contextlib.suppress(ImportError):
            import_module(name)
    # Objects of the imports stay out of every fork's garbage collection, and their pages shared.
    gc.freeze()
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                _begin(listener.accept()[0], waiting, program)
            elif key.fd in waiting.get_map():
                _end(waiting, *key.data)


def _begin(channel: socket.socket, waiting: selectors.BaseSelector, program: str) -> None:
    message, streams, *_ = socket.recv_fds(channel, LARGEST, 3)
    if not message:
        channel.send(b"ready")
        channel.close()
        return
    child = os.fork()
    if child == 0:
        _become(json.loads(message), streams, program)
    for one in streams:
        os.close(one)
    ended = os.pidfd_open(child)
    waiting.register(ended, selectors.EVENT_READ, (channel, child, ended))
    # Readable when the program has ended.
    waiting.register(channel, selectors.EVENT_READ, (channel, child, ended))
    channel.send(str(child).encode())


def _end(waiting: selectors.BaseSelector, channel: socket.socket, child: int, ended: int) -> None:
    """The fork or its program has ended: end the other one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    for one in (channel, ended):
        waiting.unregister(one)
    with contextlib.suppress(OSError):
        channel.send(str(status).encode())
    channel.close()
    os.close(ended)


def _become(request: dict[str, Any], streams: list[int], program: str) -> None:
    """Run a script in this fork, as the interpreter would."""
    status = 1
    try:
        # Ray kills the process group of a worker that it lost.
        os.setpgid(0, 0)
        for index, stream in enumerate(streams):
            os.dup2(stream, index)
        os.closerange(3, 4096)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        script = request["argv"][0]
        sys.argv, sys.executable = request["argv"], program
        sys.path[0] = str(Path(script).parent)
        gc.enable()
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        if Path(request["argv"][0]).name == DRIVER:
            with contextlib.suppress(Exception):
                atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
