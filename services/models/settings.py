from __future__ import annotations

from shared.settings import ServiceSettings


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """`download_schemes` and `download_allowed_hosts` are comma lists. A host (`host` or
    `host:port`) that is listed may be downloaded from even at a private address. Another process
    takes a checkpoint over `download_lease_seconds` after the death of the one that was at it.
    `convert_pickles`: whether clean ones are stored as safetensors instead."""

    upload_expires_hours: float = 24.0
    download_schemes: str = "https"
    download_allowed_hosts: str = ""
    download_max_bytes: int = 50 * 1024**3
    downloads_parallel: int = 2
    convert_pickles: bool = False
    download_lease_seconds: float = 30.0
    sweep_seconds: float = 60.0

    def schemes(self) -> frozenset[str]:
        return _items(self.download_schemes)

    def allowed_hosts(self) -> frozenset[str]:
        return _items(self.download_allowed_hosts)


def _items(text: str) -> frozenset[str]:
    return frozenset(item.strip().lower() for item in text.split(",") if item.strip())
