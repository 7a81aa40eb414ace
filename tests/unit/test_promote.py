"""`acpo promote`: only a clean run is registered, with a complete card."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from acpo_dist.analysis.release.verdict import judge_run
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.mlflow_run import make_sqlite
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.run_folder import read_run_config
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.helpers.runs import PLAIN

pytest.importorskip("mlflow", reason="needs the extra `mlflow`")


@pytest.fixture
def run(plain_run, tmp_path):
    """A run of three iterations with a checkpoint of each, a clean guard, and the second as the best by the judges."""
    root = tmp_path / "run"
    shutil.copytree(plain_run.run_dir, root)
    change_guard(root, best=[2, 0.1], rules={})
    return root


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory):
    """MLflow takes seconds to create a database, so it is created once and copied."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("registry") / "registry.db"
    make_sqlite(f"sqlite:///{path}", MlflowClient)
    return path


@pytest.fixture
def registry(empty_registry, tmp_path) -> str:
    """URI of an empty registry."""
    return f"sqlite:///{shutil.copy(empty_registry, tmp_path / 'registry.db')}"


def change_guard(root: Path, **values) -> None:
    """Write another state of the guard into the newest checkpoint, with a valid manifest."""
    store = CheckpointStore(root / "checkpoints", keep=9)
    newest = store.newest()
    assert newest is not None
    state = {key: value for key, value in newest.state.items() if key != "iteration"}
    state["guard"]["state"].update(values)
    partial = store.prepare(newest.iteration)
    for path in newest.learner_folder.iterdir():
        (partial / "learner" / path.name).write_bytes(path.read_bytes())
    store.commit(partial, newest.iteration, state)


def card_of(folder: Path) -> tuple[dict, str]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_clean_run_registers_its_best_checkpoint_under_an_alias(run, registry, acpo):
    from mlflow.tracking import MlflowClient

    code, out, err = acpo("promote", str(run), "--name", "toy", "--uri", registry, "--json")
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert answer["clean"] and not answer["forced"] and answer["iteration"] == 2 and answer["version"] == "1"
    client = MlflowClient(tracking_uri=registry)
    version = client.get_model_version_by_alias("toy", "promoted")
    assert str(version.version) == "1" and version.tags["acpo.guard"] == "clean" and "acpo.forced" not in version.tags
    files = {item.path for item in client.list_artifacts(answer["mlflow_run_id"], "promoted/export-000002")}
    assert {
        "promoted/export-000002/README.md",
        f"promoted/export-000002/{read_run_config(run).run.name}.safetensors",
    } <= files
    # What lies there is the second checkpoint and not the last one.
    store = CheckpointStore(run / "checkpoints", keep=9)
    adapters = load_file(next((run / "export-000002").glob("*.safetensors")))
    policies = [load_file(store.open(n).learner_folder / "policy.safetensors") for n in (2, 3)]
    norms = sorted(float(value.norm()) for name, value in policies[0].items() if "lora_B" in name)
    found = sorted(float(value.norm()) for name, value in adapters.items() if "lora_up" in name)
    assert found == pytest.approx(norms, rel=1e-6)
    assert norms != pytest.approx(sorted(float(v.norm()) for n, v in policies[1].items() if "lora_B" in n), rel=1e-6)
    # Promoted again, it is the next version, and the alias moves on.
    assert acpo("promote", str(run), "--name", "toy", "--uri", registry)[0] == 0
    assert str(client.get_model_version_by_alias("toy", "promoted").version) == "2"


def test_the_cards_code_loads_the_model_and_the_card_names_its_facts(tiny, registry, tmp_path, acpo, monkeypatch):
    run = tmp_path / "run"
    # The card's code finds an embedded model by its name, as it does a model of the hub.
    drive(tiny(*PLAIN, "model.path=toy-sdxl", f"run.dir={run}"), open_ports, Console(quiet=True))
    code, _, err = acpo("promote", str(run), "--uri", registry, "--checkpoint", "newest")
    assert code == 0, err
    head, text = card_of(run / "export")
    assert head["library_name"] == "diffusers" and head["base_model"] == "toy-sdxl"
    config = read_run_config(run)
    assert config.run.name in text and "strided_judge" in text and "drove the update" in text
    gains = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{gains['gain/strided_judge']:+.2f}" in text and "not stated in the base model" in text
    assert "By force" not in text and "Clean" in text and str(tmp_path) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(run / "export")
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert (run / "export" / "image.png").stat().st_size > 100


@pytest.mark.parametrize("case", ["standing warning", "ended", "no judge"])
def test_a_run_that_is_not_clean_is_refused_unless_forced_and_the_card_states_it(run, tmp_path, acpo, case):
    from mlflow.tracking import MlflowClient

    if case == "standing warning":
        change_guard(run, rules={"hacking_gap": {"level": "warn", "over_warn": 4, "over_stop": 0}})
        words = "rule `hacking_gap` was at level `warn`"
    elif case == "ended":
        reason = {"rule": "drift", "level": "stop", "value": 3.0, "warn": 1.0, "stop": 1.2}
        record = {"iteration": 2, "action": "stop", "reasons": [reason], "best_iteration": 2}
        (run / "guard.jsonl").write_text(json.dumps(record) + "\n")
        words = "drift is 3.00 times its budget"
    else:
        resolved = yaml.safe_load((run / "resolved.yaml").read_text())
        resolved["rewards"]["judges"] = []
        (run / "resolved.yaml").write_text(yaml.safe_dump(resolved))
        words = "rewards.judges is empty"
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    code, _, err = acpo("promote", str(run), "--name", "toy", "--uri", uri)
    assert code == 2 and words in err and "--force" in err
    assert not (tmp_path / "registry.db").exists() and not (run / "export" / "README.md").exists()
    (objection,) = judge_run(run, read_run_config(run))[0].objections
    assert words in objection
    if case != "standing warning":
        # By force, every objection is treated as this one.
        return
    code, _, err = acpo("promote", str(run), "--name", "toy", "--uri", uri, "--force")
    assert code == 0 and "BY FORCE" in err
    client = MlflowClient(tracking_uri=uri)
    version = client.get_model_version("toy", "1")
    assert version.tags["acpo.forced"] == "true" and words in version.tags["acpo.objections"]
    assert "promoted" not in client.get_registered_model("toy").aliases
    assert "Promoted by force" in card_of(run / "export-000002")[1] and words in card_of(run / "export-000002")[1]


def test_a_warning_that_has_passed_does_not_stand_in_the_way_and_is_on_the_card(run, registry, acpo):
    reason = {"rule": "judge_fall/strided_judge", "level": "warn", "value": 0.7, "warn": 0.6, "stop": 0.8}
    record = {"iteration": 0, "action": "warn", "reasons": [reason], "best_iteration": 0}
    (run / "guard.jsonl").write_text(json.dumps(record) + "\n")
    code, _, err = acpo("promote", str(run), "--uri", registry)
    assert code == 0, err
    assert "iteration 1, warn: judge `strided_judge` has fallen 0.70" in card_of(run / "export-000002")[1]


def test_metrics_of_an_evaluation_are_added_to_the_card(run, registry, tmp_path, acpo):
    found = acpo(
        "eval", str(run), "--checkpoint", "best", "--suite", "toy", "--limit", "4", "--compare", "base", "--drift", "0",
        "--out", str(tmp_path / "e"), "--json",
    )  # fmt: skip
    assert found[0] == 0, found[2]
    mean = json.loads((tmp_path / "e" / "evaluation.json").read_text())["judges"][0]["model"]["mean"]
    code, _, err = acpo("promote", str(run), "--uri", registry, "--evaluation", str(tmp_path / "e"))
    assert code == 0, err
    text = card_of(run / "export-000002")[1]
    assert "suite `toy`, 4 of 48 prompts, against base" in text and f"{mean:.4g}" in text
    assert "| 4 samples, 4 pairs |" in text
    assert str(tmp_path) not in text
    # Figures of other weights have no place there.
    code, _, err = acpo("promote", str(run), "--checkpoint", "newest", "--evaluation", str(tmp_path / "e"))
    assert code == 2 and "other weights than iteration 3" in err


def test_what_cannot_be_promoted_is_refused(run, tmp_path, acpo):
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    code, _, err = acpo("promote", str(tmp_path), "--uri", uri)
    assert code == 2 and "is not a run" in err
    code, _, err = acpo("promote", str(run), "--uri", uri, "--checkpoint", "7")
    assert code == 2 and "no checkpoint of iteration 7; kept are 1, 2, 3" in err
    code, _, err = acpo("promote", str(run), "--uri", uri, "--evaluation", str(tmp_path))
    assert code == 2 and "holds no finished evaluation" in err
    change_guard(run, best=[0, 0.0])
    code, _, err = acpo("promote", str(run), "--uri", uri)
    assert code == 2 and "no checkpoint scored higher than the base model" in err
    (run / "export" / "acpo.json").unlink()
    code, _, err = acpo("promote", str(run), "--uri", uri)
    assert code == 2 and "has no export" in err


def test_a_registry_that_cannot_be_reached_is_an_error_without_its_password(run, acpo, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    code, _, err = acpo("promote", str(run), "--uri", "http://user:hidden@127.0.0.1:9")
    assert code == 1 and "Nothing was promoted" in err and "hidden" not in err
