"""The command line of the embedded stack: `just up` is `python -m deploy.local up`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from deploy.local import supervisor
from deploy.local.installation import Installation, InstallationError, default_home, locked
from deploy.local.stack import Stack, StackError

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(highlight=False, soft_wrap=True, stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (InstallationError, StackError, ValueError) as error:
        err.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> _Parser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    setup = command("setup-secrets", setup_secrets, "choose ports and secrets; start nothing")
    setup.add_argument("--random-ports", action="store_true", help="not the usual ones")
    up_ = command("up", up, "start everything, return when it is healthy; safe to repeat")
    up_.add_argument("--servers-only", action="store_true", help="NATS, Postgres and SeaweedFS")
    command("down", down, "stop everything, workers included")
    command("status", status, "what runs and how it is; exit code 0 if all is healthy")
    logs_ = command("logs", logs, "the end of the logs")
    logs_.add_argument("service", nargs="?", help="one process; without it, all of them")
    logs_.add_argument("-f", "--follow", action="store_true", help="go on as lines arrive")
    logs_.add_argument("-n", "--lines", type=int, default=20, help="how many lines (20)")
    reset_ = command("reset", reset, "stop everything and delete all data and secrets")
    reset_.add_argument("--yes", action="store_true", help="do not ask")
    command("migrate", migrate, "apply the migrations of all services; Postgres must be up")
    command("env", env, "print local.env: what a client needs")
    restart_ = command("restart", restart, "restart one process, with a changed settings.env")
    restart_.add_argument("service")
    kill_ = command("kill", kill, "SIGKILL, to see that it heals")
    kill_.add_argument("service", nargs="+")
    return parser


_Parser = argparse.ArgumentParser


def _stack() -> Stack:
    return Stack(say=lambda text: err.print(text, style="yellow", markup=False))


def _need_installation() -> None:
    if not Installation.exists():
        raise InstallationError(f"there is nothing at {default_home()} yet: `just up` makes it")


def setup_secrets(options: argparse.Namespace) -> int:
    with locked(default_home()):
        installation = Installation.open(random_ports=options.random_ports)
    out.print(f"{installation.home / 'local.env'} holds what a client needs")
    return 0


def up(options: argparse.Namespace) -> int:
    stack = Stack(
        services=not options.servers_only,
        say=lambda text: err.print(text, style="yellow", markup=False),
    )
    begun = time.monotonic()
    state = stack.up()
    table = Table("process", "url", "pid", "ready after", box=None)
    for name, process in state.processes.items():
        seconds = "" if process.ready_seconds is None else f"{process.ready_seconds:.2f} s"
        table.add_row(name, process.url, str(process.pid), seconds)
    out.print(table)
    out.print(f"up in {time.monotonic() - begun:.1f} s; keys and passwords: {_local_env(stack)}")
    return 0


def _local_env(stack: Stack) -> str:
    file = stack.home / "local.env"
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def down(_: argparse.Namespace) -> int:
    if not Installation.exists():
        out.print("nothing to stop")
        return 0
    begun = time.monotonic()
    _stack().down()
    out.print(f"down in {time.monotonic() - begun:.1f} s")
    return 0


def status(_: argparse.Namespace) -> int:
    if not Installation.exists():
        out.print("down (never started)")
        return 1
    stack = _stack()
    state = stack.state()
    if state is None or not state.processes:
        out.print("down" if not state else f"{state.phase}: {state.failed} {state.reason}")
        return 1
    healthy = stack.health()
    table = Table("process", "url", "pid", "memory", "up for", "restarts", "health", box=None)
    for name, process in state.processes.items():
        well = healthy.get(name, False)
        table.add_row(
            name,
            process.url,
            str(process.pid),
            _memory(process.pid, tree=name == "postgres"),
            _age(process.started) if process.pid else "",
            str(process.restarts),
            "ok" if well else "[red]not ready[/red]",
        )
    for file, worker in supervisor.list_workers(stack.installation):
        table.add_row(
            f"worker-{file.stem[:8]}",
            "",
            str(worker.pid),
            _memory(worker.pid, tree=True),
            _age(worker.create_time()),
            "",
            "",
        )
    out.print(table)
    if state.phase != "ready":
        out.print(state.phase)
    return 0 if state.phase == "ready" and all(healthy.values()) else 1


def _memory(pid: int, *, tree: bool) -> str:
    """Resident memory; of a tree the proportional share, where the kernel tells it, since its
    processes share pages."""
    try:
        process = psutil.Process(pid)
        if not tree:
            return f"{process.memory_info().rss / 1e6:.0f} MB"
        family = [process, *process.children(recursive=True)]
        total = sum(_share(member) for member in family)
    except psutil.Error:
        return ""
    return f"{total / 1e6:.0f} MB"


def _share(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", full.rss))


def _age(started: float) -> str:
    seconds = int(max(0.0, time.time() - started))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


def logs(options: argparse.Namespace) -> int:
    _need_installation()
    installation = Installation.open()
    files = {file.stem: file for file in sorted(installation.logs.glob("*.log"))}
    if options.service:
        if options.service not in files:
            raise StackError(f"no log of {options.service}; there are {', '.join(files)}")
        files = {options.service: files[options.service]}
    prefixed = len(files) > 1
    positions = {}
    for name, file in files.items():
        text = file.read_text(errors="replace")
        positions[name] = len(text.encode())
        _print_lines(name if prefixed else "", text.splitlines()[-options.lines :])
    while options.follow:
        time.sleep(0.3)
        for name, file in files.items():
            positions[name] = _print_new(name if prefixed else "", file, positions[name])
    return 0


def _print_new(name: str, file: Path, position: int) -> int:
    """Prints whole lines after `position`. Returns the position of the next."""
    if not file.exists():
        return 0
    if file.stat().st_size < position:  # a new file after rotation
        position = 0
    with file.open("rb") as opened:
        opened.seek(position)
        whole, newline, _ = opened.read().rpartition(b"\n")
    _print_lines(name, whole.decode(errors="replace").splitlines() if newline else [])
    return position + len(whole) + len(newline)


def _print_lines(name: str, lines: list[str]) -> None:
    for line in lines:
        print(f"{name:<12} {line}" if name else line, flush=True)


def reset(options: argparse.Namespace) -> int:
    _need_installation()
    stack = _stack()
    if not options.yes:
        size = sum(f.stat().st_size for f in stack.home.rglob("*") if f.is_file())
        err.print(
            f"This stops the stack and deletes {stack.home}: every user, checkpoint, job and"
            f" picture ({size / 1e6:.0f} MB), and its keys."
        )
        if not sys.stdin.isatty() or input("Type yes to go on: ").strip() != "yes":
            out.print("nothing was changed")
            return 1
    stack.delete()
    out.print("deleted")
    return 0


def migrate(_: argparse.Namespace) -> int:
    import asyncio

    from deploy.local.provision import migrate_all

    _need_installation()
    applied = asyncio.run(migrate_all(Installation.open()))
    for service, names in applied.items():
        out.print(f"{service:<12} {', '.join(names) or 'nothing to do'}")
    return 0


def env(_: argparse.Namespace) -> int:
    with locked(default_home()):
        print((Installation.open().home / "local.env").read_text(), end="")
    return 0


def restart(options: argparse.Namespace) -> int:
    _need_installation()
    _stack().restart(options.service)
    out.print(f"{options.service} is back")
    return 0


def kill(options: argparse.Namespace) -> int:
    _need_installation()
    stack = _stack()
    for name in options.service:
        out.print(f"killed {name}, which was {stack.kill(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
