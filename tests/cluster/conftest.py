"""Mark the long tests of this folder, which bound the time that a fault takes, to run with nothing beside them."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("full"):
            item.add_marker("alone")
