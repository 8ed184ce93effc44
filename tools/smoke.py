"""Shows that an installed package works: run it outside of the checkout, with the Python that it was installed for.

python /checkout/tools/smoke.py [DIRECTORY]        # keeps the demo's datasets there
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jasper_store
from jasper_store.native.gather import kernel


def require_installed() -> None:
    """Check what a wheel must have, and that this is one."""
    home = Path(jasper_store.__file__).parent
    if "site-packages" not in home.parts:
        raise SystemExit(f"jasper_store was imported from {home}, not from an installed wheel")
    if not (home / "py.typed").is_file():
        raise SystemExit("the wheel lacks py.typed, so type checkers will ignore its annotations")
    library = home / "native" / "_rows.so"
    if (library.is_file() or shutil.which("cc")) and sys.platform == "linux" and kernel() is None:
        raise SystemExit(f"{library}: expected the gather kernel, found none that can be loaded")


def main() -> None:
    """Check the installation, then convert, train and compare with the bundled sample."""
    require_installed()
    with tempfile.TemporaryDirectory() as scratch:
        out = sys.argv[1] if len(sys.argv) > 1 else f"{scratch}/demo"
        script = str(Path(sys.executable).with_name("jasper-store"))
        command = [script, "demo", "--epochs", "2", "--out", out]
        done = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
    print("\n".join(done.stdout.splitlines()[-5:]))
    built = "with" if kernel() is not None else "without"
    print(
        f"{jasper_store.__version__} works: Python {platform.python_version()}, {platform.platform()}, {built} the kernel"
    )


if __name__ == "__main__":
    main()
