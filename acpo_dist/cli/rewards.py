"""`acpo rewards`."""

import sys
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app

rewards_app = typer.Typer(no_args_is_help=True, help="Rewards and judges.")
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback()
def _group() -> None:
    """Rewards and judges."""


@rewards_app.command("list")
def list_rewards(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every metric and its facts.")] = False,
) -> None:
    """List every metric: download, gradient, range, direction, smallest image, licence."""
    import rich.console

    from acpo_dist.rewards.listing import reward_listing
    from acpo_dist.tracking.console import Console

    rows = reward_listing()
    if as_json:
        answer({"rewards": rows})
        return
    # The tables are the result, so they go to standard output; the first fits 80 columns.
    console = Console(rich_console=rich.console.Console(file=sys.stdout))

    def word(value: bool) -> str:
        return "yes" if value else "no"

    def gradient(row: dict[str, Any]) -> str:
        step = row["gradient_step"]
        return word(row["differentiable"]) if step is None else f"yes {step:g}"

    console.table(
        f"{len(rows)} metrics. fetch: weights are downloaded unless given; grad: has a gradient, and the largest "
        "signed step in 1/255 that improved nine of ten real images, if measured; text: reads prompts; better: "
        "direction of better scores; min: smallest side in pixels",
        ["metric", "fetch", "grad", "text", "range", "better", "min"],
        [
            [row["name"], word(row["needs_download"]), gradient(row), word(row["needs_prompts"]), row["range"],
             row["direction"], row["minimum_size"]]
            for row in rows
        ],
    )  # fmt: skip
    for key in ("licence", "note"):
        texts = dict.fromkeys(row[key] for row in rows if row[key])
        console.table(
            f"{key}s",
            [key, "metrics"],
            [[text, ", ".join(row["name"] for row in rows if row[key] == text)] for text in texts],
        )
