"""The typer application and its error handling: one message and one exit code per error."""

import json
import logging
import os
import signal
import sys
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from acpo_dist.core.errors import AcpoError, hide_passwords
from acpo_dist.core.packages import leave_out_bitsandbytes

_GO_ON = {"train": "--resume auto"}
"""Commands that can be continued, and the option that does it."""


_terminated = False
"""Whether SIGTERM arrived. The exception that reports it may be caught and raised again as another one."""


class _Commands(TyperGroup):
    """Reports interruptions; typer would end an interrupted command without a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            word, code = interruption()
            option = _GO_ON.get(ctx.invoked_subcommand)
            say(f"{word}; continue with `acpo {ctx.invoked_subcommand} ... {option}`" if option else word)
            sys.exit(code)


def interruption() -> tuple[str, int]:
    """Return the signal behind a `KeyboardInterrupt` and its exit code."""
    return ("terminated", 143) if _terminated else ("interrupted", 130)


app = typer.Typer(
    name="acpo", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune diffusion models on no-reference image quality, held near the base model by an anchor.",
)  # fmt: skip


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    # One torch thread per process unless configured otherwise: two threads on one core are many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    leave_out_bitsandbytes()
    # Messages at import about optional kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from acpo_dist.cli import commands  # noqa: F401  (registers the commands)

    if "--json" in sys.argv[1:] and sys.stdout is sys.__stdout__:
        _keep_standard_output()
    try:
        app()
    except AcpoError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)


def _terminate(number: int, frame: object) -> NoReturn:
    """Exit as after Ctrl-C: started processes are ended, and the run is recorded as killed."""
    # A second SIGTERM must not interrupt this; SIGKILL remains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    global _terminated
    _terminated = True
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(hide_passwords(text) + "\n")


def _keep_standard_output() -> None:
    """Redirect output of libraries and child processes to standard error; only `answer` writes to standard output."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _answers.append(kept)


_answers: list[TextIO] = []
"""The real standard output, once it is redirected."""


def answer(value: dict[str, Any]) -> None:
    """Write one JSON object to standard output, which receives nothing else."""
    stream = _answers[-1] if _answers else sys.stdout
    stream.write(hide_passwords(json.dumps(value)) + "\n")
    stream.flush()
