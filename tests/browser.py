"""A page in a real headless Chromium."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Shown:
    """What came of a page."""

    dom: str
    console: list[str]


def chromium() -> str:
    """Path of the browser, or a skip."""
    found = os.environ.get("MRCNN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium ({', '.join(NAMES)}) on the PATH: set MRCNN_CHROMIUM")
    return found


def show(page: Path, folder: Path, *, width: int = 1200) -> Shown:
    """Open a page in a window of this width. `folder` is the browser's own."""
    done = subprocess.run(
        [
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--no-first-run",
            f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def measure(page: Path, folder: Path, script: str, *, width: int = 1200) -> Any:
    """What an expression says of the page when it is loaded, and all of it unfolded. A copy is opened, which allows
    scripts."""
    text, policies = POLICY.subn("", page.read_text())
    assert policies == 1
    added = (
        "<script>addEventListener('load', () => {"
        "document.querySelectorAll('details').forEach(each => { each.open = true });"
        f"const found = JSON.stringify({script});"
        "document.body.textContent = ''; const pre = document.createElement('pre'); pre.id = 'found';"
        "pre.textContent = found; document.body.append(pre) })</script>"
    )
    copy = page.with_name("measured.html")
    copy.write_text(text.replace("</body>", f"{added}</body>"))
    dom = show(copy, folder, width=width).dom
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[:2000]
    return json.loads(html.unescape(found[1]))
