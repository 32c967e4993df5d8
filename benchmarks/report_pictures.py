"""A page of torchtrim as pictures: on a phone, on a desk, in the dark, on paper, without JavaScript.

    python benchmarks/report_pictures.py report.html pictures/

Needs Chromium or Chrome on the PATH (Debian: apt-get install chromium); for the printed pages as PNG also pdftoppm
(apt-get install poppler-utils). Pictures of phone, desk and dark show the whole page, as tall as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
# Headless Chromium lays a page out at 500 pixels and more, whatever its window: a frame is as narrow as it is told.
# Without leave for scripts nothing of the page's own runs, as in a browser where JavaScript is off.
_FRAME = """<!doctype html><meta charset="utf-8"><title>?</title><style>html,body{{margin:0}}iframe{{border:0;
display:block;width:{width}px;height:{height}px}}</style><iframe srcdoc="{page}" sandbox="allow-same-origin {more}">
</iframe><script>onload = () => {{ const root = document.querySelector("iframe").contentDocument.documentElement;
document.title = ["size", root.clientWidth, root.scrollWidth, root.scrollHeight].join(" "); }};</script>"""


def browser() -> str | None:
    """The first Chromium on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def run(*arguments: str) -> str:
    """Run Chromium once, with a profile of its own, and give what it wrote."""
    program = browser()
    if program is None:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is on the PATH. Try: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="report-pictures-", ignore_cleanup_errors=True) as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if answer.returncode:
        sys.exit(f"{program} ended with {answer.returncode}:\n{answer.stderr[-2000:]}")
    return answer.stdout


def size(page: Path, width: int, *, script: bool = True) -> tuple[int, int, int]:
    """How wide the page's window is, how wide its content, and how tall, all in pixels.

    Args:
        page: The file.
        width: The width of the window.
        script: Whether the page's own script runs.
    """
    with tempfile.TemporaryDirectory(prefix="report-pictures-") as folder:
        dom = run("--dump-dom", framed(page, Path(folder), width, 800, script))
    found = re.search(r"<title>size (\d+) (\d+) (\d+)</title>", dom)
    if found is None:
        sys.exit(f"{page}: Chromium did not tell its size")
    wide, content, tall = map(int, found.groups())
    return wide, content, tall


def picture(page: Path, out: Path, width: int, *, scheme: str = LIGHT, script: bool = True) -> None:
    """The whole page at one width, as a PNG."""
    tall = min(size(page, width, script=script)[2], 16_000)
    with tempfile.TemporaryDirectory(prefix="report-pictures-") as folder:
        frame = framed(page, Path(folder), width, tall, script)
        run(scheme, f"--window-size={width},{tall}", f"--screenshot={out.absolute()}", frame)


def framed(page: Path, folder: Path, width: int, height: int, script: bool) -> str:
    """Where a page is that shows another one in a frame of a size."""
    text = escape(page.read_text(encoding="utf-8"))
    frame = folder / "frame.html"
    more = "allow-scripts" if script else ""
    frame.write_text(_FRAME.format(width=width, height=height, page=text, more=more), encoding="utf-8")
    return frame.as_uri()


def printed(page: Path, out: Path) -> list[Path]:
    """The page as a PDF, and its leaves as PNG where pdftoppm is installed."""
    run("--no-pdf-header-footer", f"--print-to-pdf={out.absolute()}", page.absolute().as_uri())
    if shutil.which("pdftoppm") is None:
        print("no PNG of the printed pages: pdftoppm is not installed (apt-get install poppler-utils)", file=sys.stderr)
        return [out]
    subprocess.run(["pdftoppm", "-png", "-r", "80", str(out), str(out.with_suffix(""))], check=True)
    return [out, *sorted(out.parent.glob(f"{out.stem}-*.png"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the HTML file")
    parser.add_argument("out", type=Path, help="the folder for the pictures")
    options = parser.parse_args()
    if not options.page.is_file():
        parser.error(f"{options.page}: no such file")
    options.out.mkdir(parents=True, exist_ok=True)
    made = []
    for name, width, settings in (
        ("phone", 390, {}),
        ("desk", 1280, {}),
        ("phone-dark", 390, {"scheme": DARK}),
        ("desk-dark", 1280, {"scheme": DARK}),
        ("phone-no-script", 390, {"script": False}),
        ("desk-no-script", 1280, {"script": False}),
    ):
        made.append(options.out / f"{name}.png")
        picture(options.page, made[-1], width, **settings)
    made += printed(options.page, options.out / "print.pdf")
    wide, content, _ = size(options.page, 360)
    print(*made, f"at {wide} pixels the page is {content} wide", sep="\n")
    if content > wide:
        sys.exit("the page is wider than a phone")


if __name__ == "__main__":
    main()
