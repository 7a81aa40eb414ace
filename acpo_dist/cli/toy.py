"""`acpo toy build`."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import app, say

toy_app = typer.Typer(no_args_is_help=True, help="The embedded toy world.")
app.add_typer(toy_app, name="toy")


@toy_app.callback()
def _group() -> None:
    """The embedded toy world."""


@toy_app.command("build")
def build(
    folder: Annotated[
        Path, typer.Option(help="Output folder; the package's own assets are in acpo_dist/data/toy/assets.")
    ] = Path("toy-assets"),
    part: Annotated[
        list[str] | None, typer.Option(help="reward, judge, vae, sdxl, ddpm, sd15 or flow; all by default.")
    ] = None,
    effort: Annotated[
        float, typer.Option(min=0.001, help="Factor on training steps; 1 gives the shipped assets.")
    ] = 1.0,
) -> None:
    """Rebuild the toy models from seeds (about 100 CPU minutes at effort 1)."""
    from acpo_dist.core.errors import UsageError
    from acpo_dist.tracking.console import Console
    from acpo_dist.training import toy_assets as toy

    parts = part or list(toy.PARTS)
    unknown = [name for name in parts if name not in toy.PARTS]
    if unknown:
        raise UsageError(f"unknown part {', '.join(unknown)}; known: {', '.join(toy.PARTS)}")
    console = Console()
    for name in parts:
        with console.phase(f"toy {name}", None) as advance:
            toy.build(name, folder, effort=effort, progress=lambda step, steps, loss, tick=advance: tick(1))
        say(f"toy {name}: done")
