"""TensorBoard draws what a run has written: its pages in a real browser."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmole_dist.distributed import free_port
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.browser import find_chromium, screenshot
from tests.small_run import make_config, make_folder, run_training

LINE = np.array([255, 112, 67])  # of TensorBoard's first run
HEADER, SIDEBAR = 80, 370  # pixels, which have that colour too


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Its address while it serves a folder."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "TensorBoard does not answer"
                time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()


def drawn(address: str, page: str, picture: Path) -> np.ndarray:
    """The page's part beside menus, (height, width, 3)."""
    screenshot(f"{address}#{page}", picture, 1400, 1200, wait_ms=30_000, timeout=120)
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)[HEADER:, SIDEBAR:]


def near(pixels: np.ndarray, colour: np.ndarray) -> int:
    """Number of pixels of about that colour."""
    return int((np.abs(pixels - colour).max(-1) < 40).sum())


@pytest.mark.full
@pytest.mark.timeout(900)
def test_its_pages_show_drawn_charts(tmp_path: Path, ranks2: LocalRanks) -> None:
    find_chromium()
    config = make_config(make_folder(tmp_path), run={"detail_every": 2})
    ranks2.run(run_training, str(config))
    (tmp_path / "nothing").mkdir()
    with tensorboard(tmp_path / "nothing") as address:
        empty = {page: drawn(address, page, tmp_path / f"empty_{page}.png") for page in ("custom_scalars", "scalars")}
    assert all(near(pixels, LINE) < 100 for pixels in empty.values())
    with tensorboard(tmp_path / "run" / "tensorboard") as address:
        # Three charts in a row, lines in all of them.
        headlines = drawn(address, "custom_scalars", tmp_path / "custom_scalars.png")
        thirds = [headlines[:, left : left + 300] for left in (0, 330, 660)]
        assert min(near(third, LINE) for third in thirds) > 200, [near(third, LINE) for third in thirds]
        assert near(drawn(address, "scalars", tmp_path / "scalars.png"), LINE) > 200
        # A load map is of shades of blue, or red where an expert is dead.
        images = drawn(address, "images", tmp_path / "images.png")
        assert (images[..., 2] - images[..., 0] > 60).sum() > 10_000
