"""The pictures of ``jasper-store report`` in the documents, made anew: ``make screenshot DATA=path/to/a/dataset``.

The report is run from the directory that holds the dataset, by the dataset's name, so that no path of this machine is
in the picture. Chromium draws a window that is taller than any page; what is below the page is cut off; the colours are
reduced to a palette. Needs Chromium (Debian's package of that name) and Pillow (in the extra ``docs``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

TALLEST, MARGIN = 12_000, 30
VARIANTS = (("", 1280, False), ("-dark", 1280, True), ("-400", 400, False), ("-400-dark", 400, True))
"""Ending of the picture's name, width of the window in pixels, and whether the reader prefers a dark page."""
MOST_BYTES = 400_000
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "report.png"


def browser() -> str:
    """Chromium, by any of its names."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise SystemExit("needs chromium, and found none; on Debian: apt install chromium")


def draw(page: Path, shot: Path, profile: Path, width: int, *, dark: bool) -> None:
    """A page as Chromium shows it, and the empty space below it."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={profile}",
        f"--window-size={width},{TALLEST}",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def whole_page(shot: Path) -> Image.Image:
    """The picture down to the last thing on it, in a palette."""
    image = Image.open(shot).convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((1, image.height - 1)))
    box = ImageChops.difference(image, background).getbbox()
    if box is None or box[3] + MARGIN > image.height:
        raise SystemExit(f"expected a page of less than {TALLEST} pixels in height, found an empty or a longer one")
    return image.crop((0, 0, image.width, box[3] + MARGIN)).quantize(128, dither=Image.Dither.NONE)


def keep(picture: Image.Image, path: Path) -> None:
    """Save a picture, unless it is too large for the documents."""
    picture.save(path, optimize=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{path}: {size:,} bytes, more than a picture in the documents may have ({MOST_BYTES:,})")
    print(f"{path}: {size:,} bytes")


def main() -> None:
    """Run the report, draw it, keep the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="a JASPER dataset directory")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the first picture; the others lie beside it")
    options = parser.parse_args()
    data = options.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        page, shot = Path(scratch, "report.html"), Path(scratch, "report.png")
        # Not check=True: a report of data with findings exits with 4, and is a page all the same.
        subprocess.run(
            [str(Path(sys.executable).with_name("jasper-store")), "report", data.name, "--out", str(page)],
            cwd=data.parent,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        if not page.exists():
            raise SystemExit(1)
        for ending, width, dark in VARIANTS:
            draw(page, shot, Path(scratch, "profile"), width, dark=dark)
            keep(whole_page(shot), options.out.with_stem(options.out.stem + ending))


if __name__ == "__main__":
    main()
