"""Fixtures for ranks that all tests of a session share."""

import os
from collections.abc import Iterator

import pytest

from ldmole_dist.selftest import processes
from ldmole_dist.selftest.local_ranks import LocalRanks

# A folder that does not exist is not looked for on the Hugging Face hub, which takes 45 s without a network. Read at import.
os.environ["HF_HUB_OFFLINE"] = "1"
processes.preload += ["pytest", "tests.small_run"]  # what the modules of nearly all functions sent to ranks import


@pytest.fixture(scope="session")
def ranks1() -> Iterator[LocalRanks]:
    with LocalRanks(1, timeout=200) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks2() -> Iterator[LocalRanks]:
    with LocalRanks(2, timeout=200) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks4() -> Iterator[LocalRanks]:
    with LocalRanks(4, timeout=200) as ranks:
        yield ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest file goes first: whichever worker gets it, the other one runs the rest meanwhile.
    items.sort(key=lambda item: item.path.name != "test_readme.py")
