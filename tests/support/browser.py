"""A page in a real browser, if the machine has one."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,2000",
    "--virtual-time-budget=8000",
)


def browse(page: Path, profile: Path, *more: str) -> str:
    """Open ``page`` and return the document as the browser has it, or its picture's path."""
    profile.mkdir()
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HOME": str(profile)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def facts(document: str) -> dict[str, str]:
    """Return the data attributes of the html element."""
    root = re.search(r"<html[^>]*>", document)
    assert root is not None, document[:500]
    return {
        key: html.unescape(value) for key, value in re.findall(r'data-(\w+)="([^"]*)"', root[0])
    }
