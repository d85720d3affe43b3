"""Which instances a deployment has, and how many, in ESD's words."""

from __future__ import annotations

import re

import pytest

from deploy.local.client import Failed
from tests.e2e.described import StrictClient


def test_an_unknown_type_is_a_400_that_names_those_that_are_known(api: StrictClient) -> None:
    with pytest.raises(Failed) as refused:
        api.create_endpoint("no-such-type", instance_type="tpu")
    assert refused.value.status == 400
    assert re.fullmatch(
        r".*ResourceLimitExceeded: instance type tpu is unknown here; known: cpu, gpu",
        str(refused.value),
    )


def test_a_count_over_the_quota_is_a_400_that_says_which_allowed_and_used(
    api: StrictClient,
) -> None:
    with pytest.raises(Failed) as refused:
        api.create_endpoint("too-many", count=99, instance_type="ml.g5.2xlarge")
    assert refused.value.status == 400
    assert re.fullmatch(
        r".*ResourceLimitExceeded: 99 instances of ml\.g5\.2xlarge wanted, 4 allowed, \d+ in use",
        str(refused.value),
    )
