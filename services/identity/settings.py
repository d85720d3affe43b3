from __future__ import annotations

from shared.settings import ServiceSettings


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """The first user, made once on an empty deployment; an argon2id hash, never the password."""

    admin_user: str = "admin"
    admin_password_hash: str = ""
