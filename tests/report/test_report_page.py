"""The report's page rendered by a browser."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ldmole_dist.cli import main
from ldmole_dist.report.style import PALETTE
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.browser import screenshot
from tests.small_run import make_config, make_folder, run_training

WIDTH, HEIGHT = 1300, 9000


def pixels_near(picture: np.ndarray, color: str) -> int:
    """Return the number of pixels whose red, green and blue differ by at most 12 from a color's."""
    return int((np.abs(picture - 255 * np.array(to_rgb(color))) <= 12).all(axis=2).sum())


def rendered(page: Path, picture: Path) -> np.ndarray:
    """Return a screenshot of a page, (height, width, 3)."""
    screenshot(page.as_uri(), picture, WIDTH, HEIGHT)
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


@pytest.mark.full
def test_browser_shows_every_figure(tmp_path: Path, ranks1: LocalRanks) -> None:
    config = make_config(
        make_folder(tmp_path),
        optimisation={"max_steps": 2},
        parallelism={"ep_size": 1},
        run={"save_every": 1},
    )
    ranks1.run(run_training, str(config))
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report" / "index.html"
    text = page.read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert len(pictures) == 8
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r'src="data:[^"]*"', "", text))
    with_charts, without = rendered(page, tmp_path / "page.png"), rendered(bare, tmp_path / "bare.png")
    assert with_charts.shape == without.shape == (HEIGHT, WIDTH, 3)

    # Find each figure, scaled to the width of the page's body, below the previous one.
    top_limit = 0
    for data in pictures:
        chart = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        width = 1160  # max-width of the body
        scaled = np.asarray(chart.resize((width, round(chart.height * width / chart.width)))).astype(int)
        left = (WIDTH - width) // 2
        column = with_charts[:, left : left + width]
        ink = np.abs(scaled - 255).mean()
        differences = [
            np.abs(column[top : top + len(scaled) : 16, ::16] - scaled[::16, ::16]).mean()
            for top in range(top_limit, HEIGHT - len(scaled))
        ]
        position = int(np.argmin(differences))
        assert ink > 1 and differences[position] < 0.35 * ink, (position, differences[position], ink)
        top_limit += position + len(scaled)

    for color in PALETTE[:6]:  # without black, which is also the color of text
        assert pixels_near(with_charts, color) > 300 > 30 > pixels_near(without, color), color
