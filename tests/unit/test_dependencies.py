"""Pinned versions against advisories that were known when this list was written by hand; it replaces no `pip-audit`."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
ADVISORIES = [
    ("aiohttp", "3.12.14", "CVE-2025-53643"),
    ("certifi", "2024.7.4", "CVE-2024-39689"),
    ("cryptography", "44.0.1", "CVE-2024-12797"),
    ("filelock", "3.20.3", "CVE-2026-22701"),
    ("flask-cors", "6.0.0", "CVE-2024-6866"),
    ("fonttools", "4.60.2", "CVE-2025-66034"),
    ("gitpython", "3.1.41", "CVE-2024-22190"),
    ("gunicorn", "23.0.0", "CVE-2024-6827"),
    ("h11", "0.16.0", "CVE-2025-43859"),
    ("idna", "3.7", "CVE-2024-3651"),
    ("jinja2", "3.1.6", "CVE-2025-27516"),
    ("mlflow", "3.9.0", "CVE-2026-2393"),
    ("opencv-python", "4.8.1.78", "CVE-2023-4863"),
    ("pillow", "11.3.0", "CVE-2025-48379"),
    ("protobuf", "6.31.1", "CVE-2025-4565"),
    ("pyarrow", "14.0.1", "CVE-2023-47248"),
    ("ray", "2.54.0", "CVE-2026-27482"),
    ("requests", "2.32.4", "CVE-2024-47081"),
    ("scikit-learn", "1.5.0", "CVE-2024-5206"),
    ("setuptools", "78.1.1", "CVE-2025-47273"),
    ("sqlparse", "0.5.0", "CVE-2024-4340"),
    ("starlette", "0.49.1", "CVE-2025-62727"),
    ("torch", "2.6.0", "CVE-2025-32434"),
    ("tqdm", "4.66.3", "CVE-2024-34062"),
    ("transformers", "4.53.0", "CVE-2025-5197"),
    ("urllib3", "2.6.0", "CVE-2025-66418"),
    ("virtualenv", "20.26.6", "CVE-2024-53899"),
    ("werkzeug", "3.0.6", "CVE-2024-49767"),
    ("zipp", "3.19.1", "CVE-2024-5569"),
]
"""(package, first version without the defect, advisory)."""


@pytest.mark.parametrize(("package", "fixed", "advisory"), ADVISORIES)
def test_a_pinned_package_has_the_correction_of_a_known_advisory(package, fixed, advisory):
    assert Version(PINS[package]) >= Version(fixed), advisory
