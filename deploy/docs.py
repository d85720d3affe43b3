"""Writes what is made from the code: docs/asyncapi.json for programs, docs/events.md for people.

python -m deploy.docs           # `just docs`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.contracts import asyncapi
from shared.contracts.registry import TYPES

FOLDER = Path(__file__).resolve().parents[1] / "docs"

HEAD = """# Events

*Made by `just docs` from [shared/contracts](../shared/contracts). [asyncapi.json](asyncapi.json) is
the same for programs, with the JSON Schema of every message.*

Every message is a [CloudEvents 1.0](https://cloudevents.io) envelope in JSON: `type` names the
message and its version, `subject` the id of what it speaks of, `data` is the payload.
`correlation_id` is that of the HTTP request it all began with, `traceparent` the trace.

- Delivery is at least once. An event holds the whole state of what it speaks of and its `version`:
  keep the highest.
- A field may join with a default: pass over what you do not know. Anything else is a new `.vN`.
- `DARKROOM_NATS_URL` in `local.env` belongs to a NATS user that can read the channels marked
  **open**, live or replayed, and nothing else. [subscribe.py](subscribe.py) is a program that
  follows jobs, and goes on where it was after a restart.
"""


def render(document: dict[str, Any]) -> str:
    return "\n".join([HEAD, *_channels(document)]) + "\n"


def _channels(document: dict[str, Any]) -> Iterator[str]:
    operations = {o["channel"]["$ref"]: o for o in document["operations"].values()}

    def rank(item: tuple[str, dict[str, Any]]) -> tuple[bool, int]:
        """What everybody may read first; then events, work, telemetry, commands."""
        address = item[1]["address"]
        first = ("evt", "jobs", "progress", "beats", "dead", "cmd").index(address.split(".")[0])
        return not asyncapi.is_open(address), first

    for id_, channel in sorted(document["channels"].items(), key=rank):
        mark = " · **open**" if "tags" in channel else ""
        yield f"## `{channel['address']}`{mark}\n"
        yield f"{operations[f'#/channels/{id_}']['summary']}. {channel['description']}\n"
        said: dict[str, list[str]] = {}
        for name in channel["messages"]:
            said.setdefault(asyncapi.description_of(TYPES[name]), []).append(name)
        for text, names in said.items():
            listed = ", ".join(f"`{name}`" for name in names)
            yield f"- {listed}" + (f": {text}" if text else "")
        yield ""


def written() -> dict[Path, str]:
    """What each file should hold."""
    document = asyncapi.document()
    return {
        FOLDER / "asyncapi.json": json.dumps(document, indent=1, ensure_ascii=False) + "\n",
        FOLDER / "events.md": render(document),
    }


def main() -> None:
    for file, text in written().items():
        file.write_text(text)
        print(f"wrote {file.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
