"""TensorBoard renders the reports of a run in a real browser."""

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

LINE = np.array([255, 112, 67])  # RGB color of TensorBoard's first run
HEADER, SIDEBAR = 80, 370  # in pixels; cropped, because they use that color too


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve a folder with TensorBoard and yield the address."""
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
                assert time.monotonic() < deadline and server.poll() is None, "TensorBoard does not respond"
                time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()


def drawn(address: str, page: str, picture: Path) -> np.ndarray:
    """Return a screenshot of a page without its menus, (height, width, 3)."""
    screenshot(f"{address}#{page}", picture, 1400, 1200, wait_ms=30_000, timeout=120)
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)[HEADER:, SIDEBAR:]


def near(pixels: np.ndarray, colour: np.ndarray) -> int:
    """Return the number of pixels with approximately this color."""
    return int((np.abs(pixels - colour).max(-1) < 40).sum())


@pytest.mark.full
@pytest.mark.timeout(900)
def test_pages_show_charts(tmp_path: Path, ranks2: LocalRanks) -> None:
    find_chromium()
    config = make_config(make_folder(tmp_path), run={"detail_every": 2})
    ranks2.run(run_training, str(config))
    (tmp_path / "no_runs").mkdir()
    with tensorboard(tmp_path / "no_runs") as address:
        assert near(drawn(address, "custom_scalars", tmp_path / "empty.png"), LINE) < 100
    with tensorboard(tmp_path / "run" / "tensorboard") as address:
        # Three charts per row, each with lines.
        headlines = drawn(address, "custom_scalars", tmp_path / "custom_scalars.png")
        thirds = [headlines[:, left : left + 300] for left in (0, 330, 660)]
        assert min(near(third, LINE) for third in thirds) > 200, [near(third, LINE) for third in thirds]
        # Load images are blue, with red for dead experts.
        images = drawn(address, "images", tmp_path / "images.png")
        assert (images[..., 2] - images[..., 0] > 60).sum() > 10_000
