"""What `acpo submit` uploads and refuses before a cluster is asked."""

import pytest

from acpo_dist.core.errors import UsageError
from tests.unit.config_for_tests import SMALLEST, write

jobs = pytest.importorskip("actors.jobs")


def test_a_shipped_configuration_needs_no_upload():
    assert jobs.plan_upload("toy_sdxl", None) == ("toy_sdxl", None)


def test_a_file_below_the_current_folder_is_called_as_it_lies_there(tmp_path, monkeypatch):
    file = write(tmp_path / "a.yaml", SMALLEST)
    monkeypatch.chdir(tmp_path)
    called, upload = jobs.plan_upload(str(file), None)
    assert called == "a.yaml" and upload.folder == tmp_path
    assert {".git", ".venv", "runs", ".env", "/acpo_dist", "/actors"} <= set(upload.excludes)
    _, with_code = jobs.plan_upload(str(file), None, ship_code=True)
    assert "/acpo_dist" not in with_code.excludes and ".git" in with_code.excludes


def test_a_file_elsewhere_takes_its_own_folder_with_it_and_another_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    file = write(tmp_path / "there" / "a.yaml", SMALLEST)
    monkeypatch.chdir(tmp_path / "here")
    called, upload = jobs.plan_upload(str(file), None)
    assert (called, upload.folder) == ("a.yaml", tmp_path / "there")
    with pytest.raises(UsageError, match="is not in --working-dir"):
        jobs.plan_upload(str(file), tmp_path / "here")


def test_a_cluster_that_is_not_there_is_named_with_what_to_do(unused_port):
    with pytest.raises(UsageError, match=f"no job service at http://127.0.0.1:{unused_port}.*ray dashboard"):
        jobs.connect(f"http://127.0.0.1:{unused_port}")


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of CONFIG"),
        (["toy_sdxl", "--list"], "give one of CONFIG"),
        (["toy_sdxl", "run.iteratoins=3"], "iteratoins"),
        (["toy_sdxl", "--env", "TOKEN"], "--env KEY=VALUE"),
    ],
)
def test_a_mistake_is_found_before_the_cluster_is_asked(arguments, said):
    from typer.testing import CliRunner

    from acpo_dist.cli import commands  # noqa: F401  (registers the commands)
    from acpo_dist.cli.app import app

    result = CliRunner().invoke(app, ["submit", *arguments])
    assert isinstance(result.exception, UsageError) and said in str(result.exception)
