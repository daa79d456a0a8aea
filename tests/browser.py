"""Screenshots of pages in a headless Chromium."""

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
    "--no-sandbox",  # containers do not allow the sandbox
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
    """Return the path of Chromium. Without one, skip the test, or fail it if LDMOLE_NEED_CHROMIUM is set."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    message = f"found no Chromium (looked for {', '.join(NAMES)})"
    if os.environ.get("LDMOLE_NEED_CHROMIUM"):
        pytest.fail(f"{message}, and LDMOLE_NEED_CHROMIUM is set")
    pytest.skip(message)


def screenshot(url: str, path: Path, width: int, height: int, wait_ms: int = 0, timeout: float = 90) -> None:
    """Save a screenshot of a page.

    Args:
        url: of the page, file:// or http://.
        path: of the PNG file.
        width: of the window, in pixels.
        height: of the window, in pixels; the screenshot ends there.
        wait_ms: virtual time that the page's scripts get before the screenshot.
        timeout: seconds until the browser is killed and the test fails.
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
            # Chromium's child processes are in the same group; it no longer exists if all of them have ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert browser.returncode == 0 and path.exists(), output
