"""Is what the documents say still true? `just check` runs this; it prints what is not.

- a relative link leads to a file that exists
- `just NAME` names a recipe
- a DARKROOM_… variable is read by some process
- every field of a job's body is in services/inference/FIELDS.md
- each service's card names the commands that it accepts, and each folder in a table exists
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from deploy.local.processes import GATEWAYS, PASS_THROUGH
from services.inference.worker.pipelines.params.control import ControlUnit
from services.inference.worker.pipelines.params.cutting import CuttingParams
from services.inference.worker.pipelines.params.enlarging import EnlargingParams
from services.inference.worker.pipelines.params.painting import OverrideSettings, PaintingParams
from shared.contracts.registry import TYPES, is_command
from shared.settings import SECRETS, ObjectSettings, variables

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ROOT / "services" / "inference" / "FIELDS.md"
PARAMS = (PaintingParams, OverrideSettings, ControlUnit, EnlargingParams, CuttingParams)
NOT_OF_THE_BODY = {"units", "number", "webui_version"}
FOR_PROVISIONING = {"DARKROOM_INSTALLATION", "DARKROOM_POSTGRES", "DARKROOM_STREAM_REPLICAS"}
SERVICES = ("gateway", "identity", "models", "endpoints", "inference")
FOR_CLIENTS = {
    "DARKROOM_URL",
    "DARKROOM_API_KEY",
    "DARKROOM_ADMIN_USER",
    "DARKROOM_ADMIN_PASSWORD",
    "DARKROOM_NATS_URL",
    "DARKROOM_S3_URL",
    "DARKROOM_HOME",
}


def problems() -> Iterator[str]:
    documents = _documents()
    for file in documents:
        text = file.read_text()
        name = str(file.relative_to(ROOT))
        yield from (f"{name}: {problem}" for problem in _links(file, text))
        yield from (f"{name}: {problem}" for problem in _recipes(text))
        yield from (f"{name}: {problem}" for problem in _variables(text))
    yield from _folders((ROOT / "README.md").read_text())
    yield from _cards()
    yield from _fields()


def _documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def _links(file: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target and not (file.parent / target).exists():
            yield f"the link {target} leads nowhere"


def _recipes(text: str) -> Iterator[str]:
    known = set(re.findall(r"^([a-z-]+)(?: \*?\w+)*:", (ROOT / "justfile").read_text(), re.M))
    for name in set(re.findall(r"\bjust ([a-z][a-z-]+)\b", "\n".join(_code(text)))):
        if name not in known:
            yield f"there is no recipe `just {name}`"


def _code(text: str) -> list[str]:
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.S)


def _variables(text: str) -> Iterator[str]:
    known = (
        FOR_CLIENTS | set(PASS_THROUGH) | {GATEWAYS, SECRETS} | known_settings() | _of_deployments()
    )
    for name in set(re.findall(r"\bDARKROOM_[A-Z0-9_]+[A-Z0-9]\b", text)):
        if name not in known:
            yield f"nobody reads {name}"


def _of_deployments() -> set[str]:
    """What compose's files ask for, and what provisioning reads."""
    texts = [file.read_text() for file in (ROOT / "deploy").glob("compose*.yaml")]
    asked = set(re.findall(r"\$\{(DARKROOM_[A-Z0-9_]+)", "".join(texts)))
    return asked | FOR_PROVISIONING


def known_settings() -> set[str]:
    """What the processes read."""
    modules = [*(f"services.{s}.settings" for s in SERVICES), "services.inference.worker.settings"]
    structs: list[type[msgspec.Struct]] = [
        ObjectSettings,
        *(importlib.import_module(module).Settings for module in modules),
    ]
    return {name for struct in structs for name in variables(struct).values()}


def _folders(readme: str) -> Iterator[str]:
    for name in re.findall(r"^\| `([a-z_/]+)` \|", readme, re.M):
        if not (ROOT / name).is_dir():
            yield f"README.md: the folder {name} does not exist"


def _cards() -> Iterator[str]:
    for service in SERVICES:
        card = importlib.import_module(f"services.{service}").__doc__ or ""
        if "Owns" not in card:
            yield f"services/{service}/__init__.py: the card says not what it owns"
        if service == "gateway":
            continue
        for name in TYPES:
            owner, action, _ = name.split(".")
            if owner == service and is_command(name) and action not in card:
                yield f"services/{service}/__init__.py: the card leaves out {action}"


def _fields() -> Iterator[str]:
    """Every field that a body may have is in the table of fields."""
    named = set(re.findall(r"`([\w.]+)`", FIELDS.read_text()))
    for struct in PARAMS:
        for field in msgspec.structs.fields(struct):
            if field.name not in named | NOT_OF_THE_BODY:
                yield f"{FIELDS.relative_to(ROOT)}: {struct.__name__}.{field.name} is left out"


def main() -> int:
    found = list(problems())
    for problem in found:
        print(problem)
    print(f"documents: {len(found) or 'no'} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
