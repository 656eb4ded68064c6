"""Headless Chromium takes pictures of pages of the built site, to check their look after a change.

python docs/site/screenshots.py shots index tutorial guides/budget      # after `make docs`; light
python docs/site/screenshots.py shots index --dark
"""

from __future__ import annotations

import argparse
import http.server
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

SITE = Path(__file__).parents[2] / "site"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def take(pages: list[str], out: Path, site: Path = SITE, size: str = "1280,1600", dark: bool = False) -> None:
    """Write `out`/PAGE.png for each page, such as "guides/budget"."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium-browser"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out.mkdir(parents=True, exist_ok=True)
    for page in pages:
        path = out / f"{page.replace('/', '-')}.png"
        url = f"http://127.0.0.1:{server.server_port}/{page}.html"
        flags = [
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            f"--window-size={size}",
            "--virtual-time-budget=3000",
        ]
        theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *flags, *theme, f"--screenshot={path}", url], check=True, capture_output=True)
    server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("pages", nargs="+", help="pages without their suffix, such as guides/budget")
    parser.add_argument("--site", type=Path, default=SITE, help="folder of the built site")
    parser.add_argument("--size", default="1280,1600", help="width and height in pixels")
    parser.add_argument("--dark", action="store_true", help="ask for the dark scheme")
    given = parser.parse_args()
    take(given.pages, given.out, given.site, given.size, given.dark)
