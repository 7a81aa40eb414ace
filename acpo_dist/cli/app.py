"""The typer application, and how errors end: one message, one exit code."""

import json
import logging
import os
import sys
from typing import Any, TextIO

import typer

from acpo_dist.core.errors import AcpoError

app = typer.Typer(
    name="acpo", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune diffusion models on no-reference image quality, held near the base model by an anchor.",
)  # fmt: skip


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted."""
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
    except KeyboardInterrupt:
        say("interrupted; continue with `--resume auto`")
        sys.exit(130)


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
