from __future__ import annotations

from datetime import timedelta
from typing import Any

from litestar import Request, delete, get, post

from services.gateway.auth import hash_token, make_token
from services.gateway.errors import ApiError
from services.gateway.routes.answers import READ, WRITE, WRITE_ONE, errors
from services.gateway.schemas import (
    AccessToken,
    Answer,
    CreateTokenBody,
    LogInBody,
    NewToken,
    Tokens,
)
from services.gateway.state import Gateway
from services.gateway.views import token_view
from shared.contracts.identity import CreateToken, RevokeToken
from shared.unit_of_work import utc_now


@post(
    "/auth/token",
    operation_id="CreateAccessToken",
    tags=["Tokens"],
    status_code=200,
    responses=errors(400, 401, 413),
)
async def create_access_token(gateway: Gateway, data: LogInBody) -> AccessToken:
    """Username and password for an access token that expires by itself."""
    await gateway.catch_up()
    token = await gateway.authenticator.log_in(data.username, data.password)
    return AccessToken(
        access_token=token, token_type="Bearer", expires_in=gateway.authenticator.seconds
    )


@get("/auth/tokens", operation_id="ListTokens", tags=["Tokens"], responses=READ)
async def list_tokens(request: Request[Any, Any, Any], gateway: Gateway) -> Answer[Tokens]:
    """Your own personal tokens, without their secret."""
    person = await gateway.authorize(request, None)
    mine = [t for t in gateway.directory.tokens.values() if t.username == person.username]
    mine.sort(key=lambda token: token.created_at)
    return Answer(200, Tokens(tokens=[token_view(token) for token in mine]))


@post("/auth/tokens", operation_id="CreateToken", tags=["Tokens"], responses=WRITE)
async def create_token(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateTokenBody
) -> Answer[NewToken]:
    """A long-lived personal token for scripts. Its secret is shown this once."""
    person = await gateway.authorize(request, None)
    ticket = await gateway.ticket(request, person)
    if ticket.repeatable:
        raise ApiError(400, "a token's secret is shown once: leave out Idempotency-Key")
    secret = make_token()
    expires = utc_now() + timedelta(seconds=data.expires_in) if data.expires_in else None
    command = CreateToken(
        token_id=ticket.new_id(),
        username=person.username,
        name=data.name,
        token_hash=hash_token(secret),
        expires_at=expires,
    )
    await gateway.dispatcher.send(command, ticket)
    token = gateway.directory.tokens[command.token_id]
    return Answer(201, NewToken(token=token_view(token), access_token=secret), "Created")


@delete(
    "/auth/tokens/{token_id:str}", operation_id="RevokeToken", tags=["Tokens"], responses=WRITE_ONE
)
async def revoke_token(request: Request[Any, Any, Any], gateway: Gateway, token_id: str) -> None:
    """Ends one of your personal tokens at once."""
    person = await gateway.authorize(request, None)
    command = RevokeToken(token_id=token_id, username=person.username)
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))


ROUTES = [create_access_token, list_tokens, create_token, revoke_token]
