"""Who is asking, and may they.

The order of checks is fixed: API key 403 (app.py, before anything is looked at), body 400 (by
Litestar, before a handler runs), person 401 and permission 403 (`authorize`, first in a handler).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Collection
from typing import Any

import jwt
import msgspec
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from litestar import Request

from services.gateway import compat
from services.gateway.errors import ApiError
from services.gateway.projections import Directory
from shared.contracts.endpoints import Endpoint
from shared.contracts.identity import Credential
from shared.contracts.inference import Job
from shared.contracts.models import Checkpoint

TOKEN_PREFIX = "dkr_"
EVERYONE = "*"
MIN_PASSWORD = 8
"""Characters."""
HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
"""argon2id as OWASP recommends it: 19 MiB, two passes. Whoever makes a first user hashes alike, so
that the time of a log-in does not tell who exists."""
_hashing = asyncio.Semaphore(2)
"""A hash takes a core for a moment: two at a time, whoever else logs in waits."""


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """A user with everything that their roles give them."""

    username: str
    roles: list[str]
    permissions: frozenset[str]

    def may(self, permission: str) -> bool:
        """`checkpoint:all` includes `checkpoint:create` and `checkpoint:list`."""
        resource = permission.split(":", 1)[0]
        return permission in self.permissions or f"{resource}:all" in self.permissions

    @property
    def is_administrator(self) -> bool:
        """Whoever manages users may also see and clear away what others left behind."""
        return "user:all" in self.permissions

    def owns(self, owner: str) -> bool:
        return owner == self.username or self.is_administrator

    def may_use_checkpoint(self, checkpoint: Checkpoint) -> bool:
        allowed = checkpoint.allowed_roles_or_users
        return (
            self.owns(checkpoint.creator)
            or EVERYONE in allowed
            or self.username in allowed
            or bool(set(self.roles).intersection(allowed))
        )

    def may_use_endpoint(self, endpoint: Endpoint) -> bool:
        return self.owns(endpoint.creator) or bool(set(self.roles).intersection(endpoint.roles))

    def may_see_job(self, job: Job) -> bool:
        return self.owns(job.owner)


def check_api_key(given: str | None, accepted_sha256: str) -> bool:
    """Compares digests in constant time, against every key, whichever matches."""
    digest = hashlib.sha256((given or "").encode()).hexdigest()
    accepted = [key.strip().lower() for key in accepted_sha256.split(",") if key.strip()]
    return bool(sum(hmac.compare_digest(digest, key) for key in accepted))


def person_of(directory: Directory, username: str) -> Person | None:
    user = directory.users.get(username)
    if user is None:
        return None
    permissions = set(user.permissions)
    for role in user.roles:
        if role in directory.roles:
            permissions.update(directory.roles[role].permissions)
    return Person(username=username, roles=user.roles, permissions=frozenset(permissions))


def permissions_of_roles(directory: Directory, roles: list[str]) -> set[str]:
    return {p for r in roles if r in directory.roles for p in directory.roles[r].permissions}


def check_no_escalation(person: Person, granted: set[str]) -> None:
    """Nobody can hand out more than they hold."""
    beyond = sorted(permission for permission in granted if not person.may(permission))
    if beyond:
        raise ApiError(403, f"you can't grant what you don't hold: {', '.join(beyond)}")


def check_roles_held(person: Person, granted: list[str]) -> None:
    """A role opens endpoints and checkpoints too: only administrators give what is not theirs."""
    beyond = sorted(set(granted).difference(person.roles))
    if beyond and not person.is_administrator:
        raise ApiError(403, f"you can't give a role that you don't hold: {', '.join(beyond)}")


def check_name_is_free(name: str, taken: Collection[str]) -> None:
    """Checkpoints list users and roles side by side: one name must not mean both, or everyone."""
    if name == EVERYONE or name in taken:
        raise ApiError(400, f'"{name}" already means something else here; choose another name')


def check_password(password: str, *, esd_compat: bool) -> None:
    """Clients of ESD may choose any that is not empty."""
    if len(password) < MIN_PASSWORD and not esd_compat:
        raise ApiError(
            400, f"password: got {len(password)} characters, allowed are {MIN_PASSWORD} or more"
        )


class Authenticator:
    def __init__(self, directory: Directory, secret: str, seconds: int, *, compat: bool) -> None:
        self._directory = directory
        self._secret = secret
        self.seconds = seconds
        self._compat = compat

    def authorize(self, request: Request[Any, Any, Any], permission: str | None) -> Person:
        """Raises ApiError 401 without a valid person, 403 without the permission."""
        person = self._find_person(request)
        if person is None:
            raise ApiError(
                401,
                "Authorization: Bearer <token> is missing or not valid (any more); "
                "get a token from POST /auth/token",
                {"WWW-Authenticate": "Bearer"},
            )
        if permission and not person.may(permission):
            raise ApiError(403, f'"{person.username}" lacks the permission {permission}')
        return person

    def _find_person(self, request: Request[Any, Any, Any]) -> Person | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token:
            username = self._verify(token.strip())
            if username is None and self._compat:
                username = compat.username_of(request)
        else:
            username = self._claimed(request) if self._compat else None
        return person_of(self._directory, username) if username else None

    def _claimed(self, request: Request[Any, Any, Any]) -> str | None:
        """The ESD profile: no token, and nobody proves anything."""
        username = compat.username_of(request)
        if username is None and compat.claims_administrator(request):
            people = (person_of(self._directory, name) for name in sorted(self._directory.users))
            return next((p.username for p in people if p and p.is_administrator), None)
        return username

    def _verify(self, token: str) -> str | None:
        if token.startswith(TOKEN_PREFIX):
            stored = self._directory.tokens_by_hash.get(hash_token(token))
            if stored is None or (
                stored.expires_at and stored.expires_at.timestamp() < time.time()
            ):
                return None
            return stored.username
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                options={"require": ["exp", "iat", "sub", "pwd"]},
            )
        except jwt.InvalidTokenError:
            return None
        credential = self._directory.credentials.get(claims["sub"])
        # A deleted user or a new password ends every token given out before.
        if credential is None or _fingerprint(credential) != claims["pwd"]:
            return None
        return str(claims["sub"])

    async def log_in(self, username: str, password: str) -> str:
        """An access token. Raises ApiError 401, as slowly for an unknown user."""
        credential = self._directory.credentials.get(username)
        encoded = credential.password_hash if credential else _DUMMY_HASH
        async with _hashing:
            good = await asyncio.to_thread(self._verify_password, encoded, password)
        if not good or credential is None:
            raise ApiError(401, "username or password is wrong")
        now = int(time.time())
        claims = {
            "sub": username,
            "iat": now,
            "exp": now + self.seconds,
            "pwd": _fingerprint(credential),
        }
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def _verify_password(self, encoded: str, password: str) -> bool:
        try:
            return HASHER.verify(encoded, password)
        except (VerificationError, InvalidHashError):
            return False

    def stand_in_for_password(self, username: str) -> str:
        """The ESD profile: what is shown instead of a user's password. Its clients build log-ins of
        their own from it, so it must be another one for each user, and nobody's guess; it follows
        from the deployment's secret, and changes with the password."""
        credential = self._directory.credentials.get(username)
        text = f"shown for {username}\n{credential.password_hash if credential else ''}"
        return hmac.new(self._secret.encode(), text.encode(), hashlib.sha256).hexdigest()[:32]

    def find_kept_hash(self, username: str, password: str) -> str | None:
        """The hash of the password that a user has, if what is given is what was shown instead of
        it: a client that changes a user's roles sends back what it was shown."""
        credential = self._directory.credentials.get(username)
        shown = self.stand_in_for_password(username)
        if credential and hmac.compare_digest(shown.encode(), password.encode()):
            return credential.password_hash
        return None

    async def hash_password(self, password: str) -> str:
        async with _hashing:
            return await asyncio.to_thread(HASHER.hash, password)


def _fingerprint(credential: Credential) -> str:
    """Another one with every password that is set, the same one too: argon2id is salted."""
    return hashlib.sha256(credential.password_hash.encode()).hexdigest()[:16]


_DUMMY_HASH = HASHER.hash("nobody")


def make_token() -> str:
    """A personal token: 256 random bits behind a prefix that secret scanners can find."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
