"""The bench as a test for pytest; `make cluster-test` shows its progress."""

import os

import pytest

from tests.cluster.bench import main
from tests.cluster.hosts import why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def test_a_cluster_of_three_machines_works_as_documented(capfd):
    if not os.environ.get("ACPO_CLUSTER_TEST"):
        pytest.skip("takes half an hour: run `make cluster-test`, or set ACPO_CLUSTER_TEST=1")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    assert main([]) == 0, capfd.readouterr().err
