"""The two outcomes a handler may raise.

    DarkroomError
    ├── Rejected       final: the caller is told why, nothing was changed
    │   └── TooLarge   no message can say what came of it
    └── Retry          not now: delivered again later

Anything else that is raised is a bug: retried a few times, then dead-lettered with its reason.
"""

from __future__ import annotations

from shared.contracts.registry import REJECTIONS


class DarkroomError(Exception):
    """Root of what handlers raise on purpose."""


class Rejected(DarkroomError):
    """The command can't be done as asked. `code` is one of its owner's REJECTIONS."""

    def __init__(self, code: str, **facts: object) -> None:
        self.code = code
        self.message = REJECTIONS[code].format(**facts)
        super().__init__(f"{code}: {self.message}")


class TooLarge(Rejected):
    """It makes a message that the bus would never take. Sizes in bytes."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__("darkroom.too_large", size=size, most=most)


class Retry(DarkroomError):
    """Something that the command needs is away for the moment."""
