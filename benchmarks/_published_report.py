"""Tables and charts of `published_metrics.py`, from its cells."""

import json
import os
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import spearmanr

os.environ.setdefault("MPLBACKEND", "Agg")

STEPS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Sizes of a signed step, in units of 1/255."""
KINDS = ("blur", "noise", "jpeg")


def report(cells: Any, options: Any) -> None:
    """Write published_metrics.json, .md and .png, and cheated.png, below `options.out`."""
    scores, whole = cells.of("score"), cells.of("whole")
    metrics = list(next(iter(whole.values())))
    rejected = {name: sum(row[name] is None for row in whole.values()) for name in metrics}
    whole = {key: row for key, row in whole.items() if None not in row.values()}
    spread = {name: float(np.std([row[name] for row in whole.values()])) for name in metrics}
    found = {
        "seeds": options.seeds, "window": options.window, "metrics": metrics,
        "images": {
            "damaged": len({tuple(key.split("/")[:2]) for key in scores}),
            "undamaged": len(whole), "rejected": rejected,
        },
        "trained": cells.of("trained"),
        "severity": {name: _severity(scores, name) for name in metrics},
        "agreement": _agreement(whole, metrics),
        "gradient": {name: _gradients(cells.of("gradient"), name) for name in metrics},
        "cheating": {name: _cheating(cells.of("cheat"), name, spread) for name in metrics},
        "spread": spread,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "published_metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "published_metrics.md").write_text(_tables(found))
    _draw(found, options.out / "published_metrics.png")
    _contact_sheet(options.out)


def _sign(metric: str) -> int:
    return 1 if metric.startswith("two_stream") else -1


def _severity(scores: dict[str, Any], metric: str) -> dict[str, Any]:
    """Spearman of quality with minus severity, pooled over images; one value per seed, and photos and SD apart."""
    table: dict[str, dict[str, list[tuple[int, float]]]] = {}
    steps: list[bool] = []
    images: dict[str, dict[str, dict[int, float]]] = {}
    for key, row in scores.items():
        seed, image, kind, level = key.split("/")
        images.setdefault(f"{seed}/{image}", {}).setdefault(kind, {})[int(level)] = _sign(metric) * row[metric]
    for key, kinds in images.items():
        seed, image = key.split("/")
        source = "photos" if image.startswith("photo") else "sd"
        for kind in KINDS:
            values = {0: kinds["none"][0], **kinds[kind]}
            steps += [values[level] < values[level - 1] for level in range(1, len(values))]
            for group in (kind, "all", source):
                table.setdefault(group, {}).setdefault(seed, []).extend((-level, v) for level, v in values.items())
    result: dict[str, Any] = {
        group: [float(spearmanr(*zip(*pairs, strict=True)).statistic) for _, pairs in sorted(seeds.items())]
        for group, seeds in table.items()
    }
    return result | {"steps_in_order": fmean(steps)}


def _agreement(whole: dict[str, Any], metrics: list[str]) -> list[list[float]]:
    columns = [[_sign(name) * row[name] for row in whole.values()] for name in metrics]
    return [[float(spearmanr(a, b).statistic) for b in columns] for a in columns]


def _gradients(cells: dict[str, Any], metric: str) -> dict[str, Any]:
    rows = [row for key, row in cells.items() if key.split("/", 2)[2] == metric]
    usable = [row for row in rows if "after" in row]
    found: dict[str, Any] = {
        "images": len(rows), "finite": sum(row["finite"] for row in rows), "zero": sum(row["zero"] for row in rows)
    }  # fmt: skip
    if usable:
        gains = np.array([[_sign(metric) * (x - row["score"]) for x in row["after"]] for row in usable])
        random = np.array([[_sign(metric) * (x - row["score"]) for x in row["random"]] for row in usable])
        found |= {
            "improved": (gains > 0).mean(0).tolist(), "median_gain": np.median(gains, 0).tolist(),
            "improved_random": (random > 0).mean(0).tolist(), "median_gain_random": np.median(random, 0).tolist(),
            "best_step": float(np.median([STEPS[at] for at in gains.argmax(1)])),
        }  # fmt: skip
        useful = [size for size, share in zip(STEPS, found["improved"], strict=True) if share >= 0.9]
        found["largest_useful_step"] = max(useful, default=None)
    return found


def _cheating(cells: dict[str, Any], metric: str, spread: dict[str, float]) -> list[dict[str, Any]]:
    """Mean over images after every number of steps: LPIPS moved and the change of every score in image deviations."""
    runs = [rows for key, rows in cells.items() if key.split("/", 2)[2] == metric]
    table = []
    for index in range(len(runs[0]) if runs else 0):
        looks = [(rows[0]["scores"], rows[index]) for rows in runs]
        table.append({
            "steps": looks[0][1]["steps"], "lpips": fmean(row["lpips"] for _, row in looks), "runs": len(runs),
            "gain": {
                name: fmean(_sign(name) * (row["scores"][name] - start[name]) / spread[name] for start, row in looks)
                for name in spread
            },
            "improved": fmean(_sign(metric) * (row["scores"][metric] - start[metric]) > 0 for start, row in looks),
        })  # fmt: skip
    return table


def _tables(found: dict[str, Any]) -> str:
    lines = ["| metric | blur | noise | jpeg | all | photographs | SD images | steps in order |", "|---" * 8 + "|"]
    for name, row in found["severity"].items():
        cells = [_spread(row[group]) for group in (*KINDS, "all", "photos", "sd")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {100 * row['steps_in_order']:.0f} % |")
    lines += ["", "| | " + " | ".join(f"`{name}`" for name in found["metrics"]) + " |"]
    lines.append("|---" * (len(found["metrics"]) + 1) + "|")
    for name, row in zip(found["metrics"], found["agreement"], strict=True):
        lines.append(f"| `{name}` | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    lines += ["", "| metric | finite | zero | " + " | ".join(f"{size}/255" for size in STEPS) + " | best |"]
    lines.append("|---" * (len(STEPS) + 4) + "|")
    for name, row in found["gradient"].items():
        head = f"| `{name}` | {row['finite']} of {row['images']} | {row['zero']} | "
        if "improved" not in row:
            lines.append(head + " | ".join("-" for _ in STEPS) + " | - |")
            continue
        cells = [
            f"{100 * share:.0f} % ({gain:+.3g})"
            for share, gain in zip(row["improved"], row["median_gain"], strict=True)
        ]
        lines.append(head + " | ".join(cells) + f" | {row['best_step']:g} |")
    lines += ["", "| steps on | steps | LPIPS | own | " + " | ".join(f"`{n}`" for n in found["metrics"]) + " |"]
    lines.append("|---" * (len(found["metrics"]) + 4) + "|")
    for name, rows in found["cheating"].items():
        for row in rows[1:]:
            cells = [f"{row['gain'][other]:+.2f}" for other in found["metrics"]]
            lines.append(
                f"| `{name}` | {row['steps']} | {row['lpips']:.4f} | {row['gain'][name]:+.2f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, ((left, right), (below, last)) = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    names = found["metrics"]
    groups = (*KINDS, "all")
    for row, name in enumerate(names):
        values = found["severity"][name]
        at = np.arange(len(groups)) + 0.13 * (row - (len(names) - 1) / 2)
        means = [fmean(values[group]) for group in groups]
        errors = np.array(
            [[mean - min(values[g]), max(values[g]) - mean] for g, mean in zip(groups, means, strict=True)]
        )
        left.bar(at, means, 0.12, yerr=errors.T, label=name)
    left.set_xticks(range(len(groups)), groups)
    left.set(title="Spearman correlation with severity (range over seeds)", ylim=(-0.7, 1))
    left.axhline(0, color="black", lw=0.5)
    left.legend(fontsize=8, ncols=2, loc="lower right")
    right.imshow(found["agreement"], vmin=-1, vmax=1, cmap="RdBu")
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set_yticks(range(len(names)), names)
    for row, line in enumerate(found["agreement"]):
        for column, value in enumerate(line):
            right.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    right.set_title(f"Spearman between metrics, {found['images']['undamaged']} undamaged SD images")
    for name, row in found["gradient"].items():
        if "improved" in row:
            below.plot(STEPS, [100 * share for share in row["improved"]], marker="o", label=name)
    below.set(xscale="log", xlabel="signed gradient step, 1/255", ylabel="improved, %", ylim=(-5, 105))
    below.set_title("Images whose score improves after one step")
    below.legend(fontsize=8)
    for name, rows in found["cheating"].items():
        if not rows:
            continue
        line = last.plot([r["lpips"] for r in rows], [r["gain"][name] for r in rows], marker="o", label=name)[0]
        others = [fmean(value for other, value in r["gain"].items() if other.split(":")[0] != name.split(":")[0])
                  for r in rows]  # fmt: skip
        last.plot([r["lpips"] for r in rows], others, ls="--", color=line.get_color())
    last.set(xlabel="LPIPS to the original", ylabel="gain in standard deviations of images")
    last.set_title("Cheating: own score (line) and mean of other metrics (dashed)")
    last.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _contact_sheet(out: Path) -> None:
    """Join the cheated images: one row per image, the original first."""
    from PIL import Image

    rows: dict[str, dict[str, Path]] = {}
    for file in sorted((out / "cheated").glob("*.png")):
        seed, image, label = file.stem.split("_", 2)
        rows.setdefault(f"{seed}_{image}", {})[label] = file
    if not rows:
        return
    labels = ["before", *sorted({label for row in rows.values() for label in row} - {"before"})]
    side = 256
    sheet = Image.new("RGB", (side * len(labels), side * len(rows)))
    for y, row in enumerate(rows.values()):
        for x, label in enumerate(labels):
            if label in row:
                sheet.paste(Image.open(row[label]).resize((side, side)), (x * side, y * side))
    sheet.save(out / "cheated.png")
