"""docs/evidence.md: the README's claims point to it, and the scripts and pages that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")


def test_every_claim_that_the_readme_refers_to_has_its_line_and_every_line_is_referred_to():
    wanted = re.findall(r"\(docs/evidence\.md#(e\d+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert wanted and sorted(set(wanted)) == sorted(re.findall(r'<a id="(e\d+)">', PAGE))


def test_everything_that_the_page_names_exists():
    named = re.findall(r"`((?:benchmarks|tests|configs)/[\w/.]+)`", PAGE)
    linked = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert named and not [path for path in named if not (ROOT / path).exists()]
    assert not [path for path in linked if path and not (ROOT / "docs" / path).exists()]
