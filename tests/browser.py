"""Pages as a headless Chromium draws them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",  # which containers do not allow
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
]


def find_chromium() -> str:
    """Its path. Skips the test where there is none, or fails it if LDMOLE_NEED_CHROMIUM is set."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    said = f"no Chromium was found (looked for {', '.join(NAMES)})"
    if os.environ.get("LDMOLE_NEED_CHROMIUM"):
        pytest.fail(f"{said}, and LDMOLE_NEED_CHROMIUM is set")
    pytest.skip(said)


def screenshot(url: str, path: Path, width: int, height: int, wait_ms: int = 0, timeout: float = 90) -> None:
    """Draw a page into a PNG.

    Args:
        url: of the page, file:// or http://.
        path: of the PNG.
        width: of the window, in pixels.
        height: of the window, in pixels; what is below is cut off.
        wait_ms: of the page's own time that its scripts may take first.
        timeout: seconds, after which the browser is ended and the test fails.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find_chromium(), *FLAGS, f"--user-data-dir={profile}", f"--screenshot={path}"]
        command += [f"--window-size={width},{height}", *([f"--virtual-time-budget={wait_ms}"] if wait_ms else []), url]
        browser = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = browser.communicate(timeout=timeout)
        finally:
            # Its helpers are in the same group; the group is gone if all of them have ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert browser.returncode == 0 and path.exists(), output
