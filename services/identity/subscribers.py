"""Message type -> function: all that identity does when spoken to."""

from __future__ import annotations

from services.identity import commands
from shared.bus import Handlers
from shared.contracts import identity

COMMANDS: Handlers = {
    identity.CreateRole: commands.create_role,
    identity.DeleteRoles: commands.delete_roles,
    identity.CreateUser: commands.create_user,
    identity.ChangeUser: commands.change_user,
    identity.DeleteUsers: commands.delete_users,
    identity.CreateToken: commands.create_token,
    identity.RevokeToken: commands.revoke_token,
    identity.ResyncIdentity: commands.resync,
}
