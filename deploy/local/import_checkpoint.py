"""`just import-checkpoint FILE… --type Lora`: files on the server into the registry.

Through the public API, as the installation's first user: what is imported is checked, hashed and
stored like any upload. Of a folder, the files of weights in it are taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from deploy.local.client import Client, Failed
from deploy.local.installation import default_home

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx")

out = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="just import-checkpoint", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file, or a folder")
    parser.add_argument("--type", required=True, help="Stable-diffusion, Lora, VAE, embeddings, …")
    parser.add_argument("--message", default="", help="what to know about it")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="role or user; else everybody"
    )
    options = parser.parse_args(arguments)
    files = list(_files(options.files))
    if not files:
        out.print(f"no file here that ends with {', '.join(SUFFIXES)}", style="red")
        return 1
    failed = sum(not _import(file, options) for file in files)
    return 1 if failed else 0


def _files(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in SUFFIXES and file.is_file()
            )
        else:
            yield path


def _import(file: Path, options: argparse.Namespace) -> bool:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    try:
        size = file.stat().st_size
        with (
            Client.log_in_at(default_home()) as client,
            Progress(*columns, TransferSpeedColumn(), console=out, transient=True) as progress,
        ):
            task = progress.add_task(file.name, total=size)
            checkpoint = client.upload_checkpoint(
                options.type,
                file,
                message=options.message,
                allowed=options.allow,
                on_part=lambda bytes_: progress.advance(task, bytes_),
            )
    except (Failed, OSError, httpx.HTTPError) as error:
        message = error.message if isinstance(error, Failed) else str(error)
        out.print(f"[red]✗[/] {file.name}: {message}")
        return False
    (found,) = checkpoint["params"]["files"].values()
    facts = (found.get("title"), found.get("precision"), found["short_hash"])
    told = ", ".join(fact for fact in facts if fact)
    out.print(f"[green]✓[/] {file.name}: {told}; checkpoint {checkpoint['id']}")
    return True


if __name__ == "__main__":
    sys.exit(main())
