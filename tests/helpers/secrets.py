"""Secrets that are planted in the environment of a run, to be searched for in all that it leaves."""

from pathlib import Path

PLANTED = "pLaNtEd5eCrEt"
SECRETS = {
    "MLFLOW_TRACKING_URI": f"http://user:{PLANTED}@127.0.0.1:9", "MLFLOW_TRACKING_TOKEN": PLANTED,
    "MLFLOW_TRACKING_PASSWORD": PLANTED, "HF_TOKEN": PLANTED, "ACPO_REWARDS_TOKEN": PLANTED + PLANTED,
    "RAY_AUTH_TOKEN": PLANTED, "AWS_SECRET_ACCESS_KEY": PLANTED, "WANDB_API_KEY": PLANTED,
}  # fmt: skip


def files_with(text: str, folder: Path) -> list[Path]:
    """Files below a folder that contain a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]
