from __future__ import annotations

from shared.settings import ServiceSettings


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """`leftovers_seconds`: how often what deleted jobs left in S3 is looked for."""

    leftovers_seconds: float = 30.0
