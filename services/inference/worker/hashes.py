"""SHA-256 of files, known again without reading them.

Reading gigabytes takes seconds: answers are kept in a folder, by path, size and time. Whoever has
hashed a file on its way to the disk keeps the answer there for everybody else. A note that can't be
written, or is no hash, costs a second reading and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path

TENSORS = " tensors"
LENGTH = hashlib.sha256().digest_size * 2


class Hashes:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / ".sha256"

    def sha256(self, path: Path) -> str:
        return self._kept(path, "", 0)

    def of_tensors(self, path: Path) -> str:
        """Of a safetensors file without its header, as training tools note it in LoRA files."""
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        return self._kept(path, TENSORS, 8 + length)

    def keep(self, path: Path, sha256: str) -> None:
        """What somebody has found out who had all of the file in hand."""
        self._write(self._place(path, ""), sha256)

    def forget(self, path: Path) -> None:
        """Before the file goes."""
        for what in ("", TENSORS):
            with contextlib.suppress(OSError):
                self._place(path, what).unlink()

    def _kept(self, path: Path, what: str, start: int) -> str:
        kept = self._place(path, what)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if len(noted := kept.read_text()) == LENGTH:
                return noted
        with path.open("rb") as file:
            file.seek(start)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._write(kept, digest)
        return digest

    def _place(self, path: Path, what: str) -> Path:
        stat = path.stat()
        known_by = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}{what}"
        return self._folder / hashlib.sha256(known_by.encode()).hexdigest()

    def _write(self, kept: Path, digest: str) -> None:
        part = kept.with_suffix(f".{os.getpid()}")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(digest)
            part.replace(kept)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
