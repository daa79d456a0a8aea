"""`ldmole validate --build` finds what the config alone does not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmole_dist.cli import main
from tests.small_run import make_config, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


def test_run_that_would_start_is_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(make_config(folder)), "--ranks", "2", "--build"]) == 0
    assert "is valid for 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.target_modules=[q_proj, qqq_proj]", "qqq_proj"),
        ("backbone.attention=no_such_attention", "no_such_attention"),
        ("backbone.path=no/such/folder", "no/such/folder"),
    ],
)
def test_error_that_only_building_shows(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    config = str(make_config(folder))
    assert main(["validate", config, override]) == 0
    capsys.readouterr()
    assert main(["validate", config, override, "--build"]) == 2
    assert message in capsys.readouterr().err
