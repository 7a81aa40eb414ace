"""The typer application, and how errors end: one message, one exit code."""

import json
import logging
import os
import sys
from typing import Any

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


def answer(value: dict[str, Any]) -> None:
    """One JSON object on standard output, and nothing else there."""
    sys.stdout.write(json.dumps(value) + "\n")
