"""`acpo plan`: resources that a run needs, without using a device."""

from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app


@app.command("plan")
def plan(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as learner.learning_rate=1e-4.")
    ] = None,
    device: Annotated[str, typer.Option(help="h200, h100, a100-80, a100-40, l40s, rtx4090, cpu or auto.")] = "auto",
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU hour, in any currency.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to compare the plan with, such as auto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show parameters, memory by role, batches and time of a run, and warn if it will run out of memory."""
    from acpo_dist.config.load import load_config
    from acpo_dist.core.errors import UsageError
    from acpo_dist.preflight.plan.plan import make_plan
    from acpo_dist.preflight.plan.rates import DEVICES
    from actors.placement import plan_placement

    if device not in (*DEVICES, "cpu", "auto"):
        raise UsageError(f"unknown --device {device}; known: {', '.join(DEVICES)}, cpu, auto")
    config = load_config(source, overrides or [])
    found = make_plan(config, device=device).to_mapping()
    need = plan_placement(config).total() if config.cluster.backend != "local" else {"CPU": 1.0, "GPU": 1.0}
    found["placement"] = {"cpus": need["CPU"], "gpus": need["GPU"], "backend": config.cluster.backend}
    if price is not None:
        hours = config.run.iterations * found["seconds_per_iteration"] / 3600
        found["cost"] = {"gpu_hours": hours * need["GPU"], "price": hours * need["GPU"] * price}
    if address is not None:
        from actors.cluster.capacity import cluster_capacity

        found["cluster"] = cluster_capacity(config, address)
    if as_json:
        answer(found)
    else:
        typer.echo(_text(found, config.run.iterations))


def _text(found: dict[str, Any], iterations: int) -> str:
    counts, device = found["parameters"], found["device"]
    lines = [
        f"parameters: {_short(counts['network'])} in the network, {_short(counts['trainable'])} train; text encoders "
        f"{_short(counts['text_encoders'])}, VAE {_short(counts['vae'])}",
        "",
        "GiB per worker     " + "".join(f"{name:>12}" for name in next(iter(found["roles"].values()))["memory_gib"]),
    ]
    for name, role in found["roles"].items():
        row = "".join(f"{value:12.2f}" for value in role["memory_gib"].values())
        lines.append(f"{name + ' x' + str(role['workers']):<19}{row}")
    limit = f"{device['memory_gib']:.1f} GiB" if device["memory_gib"] else "of unknown size"
    needs = ", ".join(f"{name} {amount:.1f}" for name, amount in device["needed_gib"].items())
    seconds = found["seconds"]
    lines += [
        "",
        f"device: {device['name']}, {limit}; needed with library overhead: {needs} GiB",
        "batch: {samples_per_iteration} samples, {optimizer_steps} optimiser steps of {global_batch} = {micro_batch} x "
        "{accumulation} x {ranks} ranks".format(**found["batch"]),
        f"time: about {found['seconds_per_iteration']:.3g} s per iteration (rollout {seconds['rollout']:.3g}, reward "
        f"{seconds['reward']:.3g}, learner {seconds['learner']:.3g}), "
        f"{iterations * found['seconds_per_iteration'] / 3600:.3g} h for {iterations} iterations",
        "placement: {cpus:g} CPUs, {gpus:g} GPUs, backend {backend}".format(**found["placement"]),
    ]
    for name, split in found["splits"].items():
        lines.append(
            "GPUs, {}: {rollout} rollout, {reward} reward, {learner} learner; {seconds:.3g} s per iteration, "
            "{idle:.0%} idle".format(name, **split)
        )
    if "cluster" in found:
        cluster = found["cluster"]
        missing = "; ".join([*(f"{n:g} {name}" for name, n in cluster["missing"].items()), *cluster["missing_by_role"]])
        held = ", ".join(f"{amount:g} {name}" for name, amount in cluster["missing_now"].items())
        lines.append(
            f"cluster: {len(cluster['machines'])} machines; missing: {missing or 'nothing'}"
            + (f"; in use or missing now: {held}" if held else "")
        )
    if "cost" in found:
        lines.append("cost: {gpu_hours:.3g} GPU hours, {price:.4g}".format(**found["cost"]))
    return "\n".join([*lines, *(f"warning: {text}" for text in found["warnings"])])


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
