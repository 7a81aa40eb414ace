"""`acpo embed`: cache the prompts' embeddings, so that a run needs no text encoder."""

from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app


@app.command("embed")
def embed(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as learner.learning_rate=1e-4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Encode every prompt of a run into model.memory.embedding_cache; cached prompts are not encoded again."""
    from acpo_dist.config.load import load_config
    from acpo_dist.core.errors import UsageError
    from acpo_dist.core.registry import MODELS, resolve
    from acpo_dist.data.prompts import run_prompts
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import default_device

    config = load_config(source, overrides or [])
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "embeddings"):
        raise UsageError(f"a `{config.model.type}` model takes no prompts: there is nothing to embed.")
    # The empty prompt is the null condition of guidance and of the anchor.
    prompts = ("", *run_prompts(config))
    embeddings = family.embeddings(config.model, device=default_device())
    console = Console()
    with console.phase("embed", len(set(prompts))) as advance:
        made = embeddings.fill(prompts, advance)
    if as_json:
        answer({"prompts": len(set(prompts)), "encoded": made, "folder": str(embeddings.folder)})
        return
    console.message(f"{made} of {len(set(prompts))} prompts encoded, the others were cached; {embeddings.folder}")
