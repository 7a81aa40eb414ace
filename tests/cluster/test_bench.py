"""The bench as a test: `make cluster-test` runs it; elsewhere it says what is missing."""

import os

import pytest

from tests.cluster.bench import main
from tests.cluster.hosts import why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def test_a_cluster_of_three_machines_does_what_its_documentation_promises(tmp_path, capfd):
    if not os.environ.get("ACPO_CLUSTER_TEST"):
        pytest.skip("takes a quarter of an hour: run `make cluster-test`")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    assert main([]) == 0, capfd.readouterr().err
