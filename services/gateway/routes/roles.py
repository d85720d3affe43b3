from __future__ import annotations

from typing import Any

from litestar import Request, delete, get, post

from services.gateway.auth import check_name_is_free, check_no_escalation
from services.gateway.routes.answers import READ, WRITE
from services.gateway.schemas import Answer, CreateRoleBody, DeleteRolesBody, Message, Roles
from services.gateway.state import Gateway, check_page
from services.gateway.views import role_view
from shared.contracts.identity import CreateRole, DeleteRoles


@get("/roles", operation_id="ListRoles", tags=["Roles"], responses=READ)
async def list_roles(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    page: int = 1,
    per_page: int = 1000,
    role_name: str | None = None,
    creator: str | None = None,
    permission: str | None = None,
) -> Answer[Roles]:
    """Roles with their permissions, by name; narrowed to a name, a creator, a permission held."""
    check_page(page, per_page)
    await gateway.authorize(request, "role:list")
    found = [
        role
        for _, role in sorted(gateway.directory.roles.items())
        if role_name in (None, role.role_name)
        and creator in (None, role.creator)
        and (permission is None or permission in role.permissions)
    ]
    shown = found[(page - 1) * per_page : page * per_page]
    return Answer(
        200,
        Roles(
            roles=[role_view(role) for role in shown],
            page=page,
            per_page=per_page,
            pages=-(-len(found) // per_page),
            total=len(found),
        ),
    )


@post("/roles", operation_id="CreateRole", tags=["Roles"], responses=WRITE)
async def create_role(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateRoleBody
) -> Message:
    """Creates a role. Nobody can grant permissions that they do not hold themselves."""
    person = await gateway.authorize(request, "role:create")
    check_no_escalation(person, set(data.permissions))
    check_name_is_free(data.role_name, gateway.directory.users)
    command = CreateRole(
        role_name=data.role_name,
        permissions=data.permissions,
        creator=person.username,
        replace=gateway.settings.esd_compat,
    )
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))
    return Message(201, "role created")


@delete("/roles", operation_id="DeleteRoles", tags=["Roles"], responses=WRITE)
async def delete_roles(
    request: Request[Any, Any, Any], gateway: Gateway, data: DeleteRolesBody
) -> None:
    """Deletes roles, and takes them from whoever holds them. What does not exist is passed over."""
    person = await gateway.authorize(request, "role:all")
    command = DeleteRoles(role_names=data.role_name_list)
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))


ROUTES = [list_roles, create_role, delete_roles]
