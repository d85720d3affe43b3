from __future__ import annotations

from typing import Any

from litestar import Request, delete, get, post, put
from msgspec.structs import replace

from services.gateway import compat
from services.gateway.auth import (
    check_name_is_free,
    check_no_escalation,
    check_password,
    check_roles_held,
    permissions_of_roles,
    person_of,
)
from services.gateway.errors import ApiError
from services.gateway.routes.answers import READ_ONE, WRITE, WRITE_ONE
from services.gateway.schemas import (
    Answer,
    ChangeUserBody,
    CreateUserBody,
    DeleteUsersBody,
    Message,
    Users,
)
from services.gateway.state import Gateway
from services.gateway.views import user_view
from shared.contracts.identity import ChangeUser, CreateUser, DeleteUsers


@get("/users", operation_id="ListUsers", tags=["Users"], responses=READ_ONE)
async def list_users(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    username: str | None = None,
    show_password: str | None = None,
) -> Answer[Users]:
    """All users, or the one named. Passwords are stored as hashes and never shown: with
    `show_password`, in the ESD profile only, each user has a text of their own instead, which is no
    password here."""
    await gateway.authorize(request, "user:list")
    directory = gateway.directory
    if username is not None and username not in directory.users:
        raise ApiError(404, f'user: "{username}" not exist')
    names = sorted(directory.users) if username is None else [username]
    people = [(directory.users[name], person_of(directory, name)) for name in names]
    views = [user_view(user, who) for user, who in people if who]
    if gateway.settings.esd_compat and compat.asks_for_passwords(show_password):
        shown = gateway.authenticator.stand_in_for_password
        views = [replace(view, password=shown(view.username)) for view in views]
    return Answer(200, Users(users=views))


@post("/users", operation_id="CreateUser", tags=["Users"], responses=WRITE)
async def create_user(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateUserBody
) -> Message:
    """Creates a user. Nobody can give roles with permissions that they do not hold themselves."""
    esd_compat = gateway.settings.esd_compat
    await gateway.catch_up()
    people = (person_of(gateway.directory, name) for name in gateway.directory.users)
    if esd_compat and data.initial and any(p.is_administrator for p in people if p):
        return Message(201, "Created")  # the clients' Connect button asks for it each time
    check_password(data.password, esd_compat=esd_compat)
    password_hash = None
    if esd_compat and data.initial and not gateway.directory.users:
        creator = data.creator or data.username
        ticket = await gateway.ticket(request, None)
    else:
        if data.initial:
            raise ApiError(400, "initial: this deployment already has users; leave it out")
        person = await gateway.authorize(request, "user:create")
        granted = permissions_of_roles(gateway.directory, data.roles) | set(data.permissions)
        check_no_escalation(person, granted)
        check_roles_held(person, data.roles)
        old = person_of(gateway.directory, data.username)
        if old and esd_compat:
            check_no_escalation(person, set(old.permissions))
            password_hash = gateway.authenticator.find_kept_hash(data.username, data.password)
        check_name_is_free(data.username, gateway.directory.roles)
        creator = person.username
        ticket = await gateway.ticket(request, person)
    command = CreateUser(
        username=data.username,
        password_hash=password_hash or await gateway.authenticator.hash_password(data.password),
        roles=data.roles,
        creator=creator,
        permissions=data.permissions,
        replace=esd_compat,
        initial=data.initial,
    )
    await gateway.dispatcher.send(command, ticket)
    return Message(201, "Created")


@put("/users/{username:str}", operation_id="ChangeUser", tags=["Users"], responses=WRITE_ONE)
async def change_user(
    request: Request[Any, Any, Any], gateway: Gateway, username: str, data: ChangeUserBody
) -> Message:
    """Gives a user other roles, permissions or another password; the next call sees it. Nobody can
    change somebody who may do more than they themselves."""
    person = await gateway.authorize(request, "user:all")
    other, user = person_of(gateway.directory, username), gateway.directory.users.get(username)
    if other is None or user is None:
        raise ApiError(404, f'user: "{username}" not exist')
    check_no_escalation(person, set(other.permissions))
    granted = permissions_of_roles(gateway.directory, data.roles or [])
    check_no_escalation(person, granted | set(data.permissions or []))
    check_roles_held(person, [role for role in data.roles or [] if role not in user.roles])
    password_hash = None
    if data.password is not None:
        esd_compat = gateway.settings.esd_compat
        check_password(data.password, esd_compat=esd_compat)
        if esd_compat:
            password_hash = gateway.authenticator.find_kept_hash(username, data.password)
        if password_hash is None:
            password_hash = await gateway.authenticator.hash_password(data.password)
    command = ChangeUser(
        username=username,
        roles=data.roles,
        permissions=data.permissions,
        password_hash=password_hash,
    )
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))
    return Message(200, "Changed")


@delete("/users", operation_id="DeleteUsers", tags=["Users"], responses=WRITE)
async def delete_users(
    request: Request[Any, Any, Any], gateway: Gateway, data: DeleteUsersBody
) -> None:
    """Deletes users; their tokens end at once. What does not exist is passed over."""
    person = await gateway.authorize(request, "user:all")
    found = [p for p in (person_of(gateway.directory, n) for n in data.user_name_list) if p]
    for other in found:
        check_no_escalation(person, set(other.permissions))
    # Only what was found and checked is passed on: what comes to be meanwhile was not.
    command = DeleteUsers(usernames=[other.username for other in found])
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))


ROUTES = [list_users, create_user, change_user, delete_users]
