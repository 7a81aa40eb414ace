"""Uploads and rejections of `acpo submit`, before a cluster is contacted."""

import pytest

from acpo_dist.core.errors import UsageError
from tests.helpers.config import SMALLEST, write

jobs = pytest.importorskip("actors.cluster.jobs")


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


def uploaded(upload, target):
    """Names in the package that Ray makes of an upload."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    with upload.runtime_env() as environment:
        create_package(environment["working_dir"], target, True, excludes=environment.get("excludes"))
    return {name for name in zipfile.ZipFile(target).namelist() if not name.endswith("/")}


def test_keys_and_settings_of_other_programs_stay_where_they_are(tmp_path, monkeypatch):
    here = tmp_path / "here"
    secrets = [
        ".ssh/id_rsa", ".aws/credentials", ".ray/auth_token", ".netrc", ".config/gcloud/key.json", ".kube/config",
        ".git-credentials", ".gnupg/ring", ".docker/config.json", "host.pem", "deep/er/.env", "id_ed25519",
    ]  # fmt: skip
    for name in [*secrets, "prompts.txt"]:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    file = write(here / "a.yaml", SMALLEST)
    monkeypatch.chdir(here)
    _, upload = jobs.plan_upload(str(file), None)
    assert uploaded(upload, tmp_path / "up.zip") == {"a.yaml", "prompts.txt"}


def test_a_home_folder_or_one_above_it_is_only_uploaded_when_it_is_named(tmp_path, monkeypatch):
    home = tmp_path / "homes/me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for folder in (home, tmp_path):
        file = write(folder / "a.yaml", SMALLEST)
        monkeypatch.chdir(folder)
        with pytest.raises(UsageError, match=f"all of {folder} would be uploaded.*--working-dir"):
            jobs.plan_upload(str(file), None)
        assert jobs.plan_upload(str(file), folder)[1].folder == folder
    with pytest.raises(UsageError, match="would be uploaded"):
        jobs.plan_upload("toy_sdxl", None, ship_code=True)


def test_files_that_a_shipped_configuration_names_travel_alone(tmp_path, monkeypatch, tiny):
    from actors.cluster.job_files import relative_files

    monkeypatch.chdir(tmp_path)
    for name in ("lists/prompts.txt", "photos/a.png", "secret.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    config = tiny("data.prompts=lists/prompts.txt", "rewards.train=[{type: two_stream, hinge: photos}]")
    files = relative_files(config)
    assert files == {"data.prompts": "lists/prompts.txt", "rewards.train.0.hinge": "photos"}
    upload = jobs.with_files(None, files)
    assert uploaded(upload, tmp_path / "up.zip") == {"lists/prompts.txt", "photos/a.png"}
    assert jobs.with_files(None, relative_files(tiny())) is None


def test_a_file_that_the_job_would_not_find_is_named_before_anything_is_uploaded(tmp_path, monkeypatch, tiny):
    from actors.cluster.job_files import relative_files

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    files = relative_files(tiny("data.prompts=prompts.txt"))
    _, upload = jobs.plan_upload(str(write(here / "a.yaml", SMALLEST)), None)
    for one in (None, upload):
        with pytest.raises(UsageError, match=r"data\.prompts=prompts\.txt is not in .*storage that all machines share"):
            jobs.with_files(one, files)
    (here / "prompts.txt").write_text("x")
    assert jobs.with_files(upload, files) is upload
    (here / ".gitignore").write_text("*.txt\n")
    with pytest.raises(UsageError, match=r"data\.prompts=prompts\.txt is not uploaded: \.gitignore"):
        jobs.with_files(upload, files)
    (tmp_path / "above.txt").write_text("x")
    with pytest.raises(UsageError, match=r"data\.prompts=\.\./above\.txt is not in"):
        jobs.with_files(upload, relative_files(tiny("data.prompts=../above.txt")))


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
def test_a_mistake_is_found_before_the_cluster_is_contacted(arguments, said):
    from typer.testing import CliRunner

    from acpo_dist.cli import commands  # noqa: F401  (registers the commands)
    from acpo_dist.cli.app import app

    result = CliRunner().invoke(app, ["submit", *arguments])
    assert isinstance(result.exception, UsageError) and said in str(result.exception)
