"""The typer application, and how errors end: one message, one exit code."""

import json
import logging
import os
import signal
import sys
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from acpo_dist.core.errors import AcpoError

_GO_ON = {"train": "--resume auto"}
"""Commands that go on where they were, and the option that says so."""


_terminated = False
"""Whether SIGTERM has come. The exception that says so may be caught below and raised anew as a plain one."""


class _Commands(TyperGroup):
    """typer itself ends an interrupted command without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            word, code = interruption()
            option = _GO_ON.get(ctx.invoked_subcommand)
            say(f"{word}; go on with `acpo {ctx.invoked_subcommand} ... {option}`" if option else word)
            sys.exit(code)


def interruption() -> tuple[str, int]:
    """What a `KeyboardInterrupt` was, and the exit code that says so."""
    return ("terminated", 143) if _terminated else ("interrupted", 130)


app = typer.Typer(
    name="acpo", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune diffusion models on no-reference image quality, held near the base model by an anchor.",
)  # fmt: skip


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    # One torch thread per process unless the user says otherwise: two that share a core are many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # Import-time chatter about optional kernels that nothing here uses.
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
    """End as after Ctrl-C: what was started is ended, and the run is recorded as killed."""
    # Whoever asks twice must not cut that short; there is SIGKILL for the impatient.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    global _terminated
    _terminated = True
    raise KeyboardInterrupt


def say(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(text + "\n")


def _keep_standard_output() -> None:
    """Send whatever libraries and child processes print to standard error; `answer` alone keeps standard output."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _answers.append(kept)


_answers: list[TextIO] = []
"""The real standard output, once it is kept apart."""


def answer(value: dict[str, Any]) -> None:
    """One JSON object on standard output, and nothing else there."""
    stream = _answers[-1] if _answers else sys.stdout
    stream.write(json.dumps(value) + "\n")
    stream.flush()
