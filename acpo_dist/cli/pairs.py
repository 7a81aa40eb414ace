"""`acpo pairs`: make preference pairs from scored images."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app, say


@app.command("pairs")
def pairs(
    scores: Annotated[Path, typer.Argument(help="CSV with the columns path, prompt, and one per score.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write, for data.pairs.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder of relative paths; default: the folder of the CSV.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="Score column to use; repeat. Default: all columns of numbers.")
    ] = None,
    lower: Annotated[list[str] | None, typer.Option(help="Score column where lower is better; repeat.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Column with the prompt.")] = "prompt",
    margin: Annotated[float, typer.Option(min=0, help="Smallest difference, in standard deviations.")] = 0.1,
    beaten: Annotated[bool, typer.Option(help="Keep pairs whose loser some score prefers.")] = False,
    duplicates: Annotated[
        float, typer.Option(min=0, help="Leave out near-duplicates (rms on 8 x 8); 0 keeps them.")
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with scores used and counts.")] = False,
) -> None:
    """Make preference pairs from scored images: best and worst of each prompt; omissions are counted by reason."""
    from acpo_dist.core.errors import DataError
    from acpo_dist.data.pair_making import pair_up, read_scores, write_pairs

    images = read_scores(scores, folder or scores.parent, score or [], prompt_column)
    kept, counts = pair_up(
        images, lower_is_better=lower or [], margin=margin, absolute=not beaten, duplicates=duplicates
    )
    used = list(images[0].scores)
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    if not kept:
        raise DataError(f"no pair is left with the scores {', '.join(used)} ({told}).")
    write_pairs(out, kept)
    if as_json:
        answer({"pairs": len(kept), "out": str(out), "scores": used, "counts": counts})
        return
    say(f"{len(kept)} pairs by {', '.join(used)}: {out} ({told})")
