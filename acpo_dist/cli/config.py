"""`acpo config show`."""

from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app

config_app = typer.Typer(no_args_is_help=True, help="Show configurations.")
app.add_typer(config_app, name="config")


@config_app.callback()
def _group() -> None:
    """Show configurations."""


@config_app.command("show")
def show(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as learner.learning_rate=1e-4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the resolved configuration: every key with its value."""
    from acpo_dist.config.load import dump, load_config

    config = load_config(source, overrides or [])
    if as_json:
        answer(config.to_mapping())
    else:
        typer.echo(dump(config), nl=False)
