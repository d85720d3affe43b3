"""identity: users, roles, permissions, passwords, personal tokens.

Owns        schema `identity`: roles, users, tokens
Accepts     identity.create_role, delete_roles, create_user, change_user, delete_users,
            create_token, revoke_token, resync
Emits       identity.role_*, user_*, token_*, and credential_* (readable by the gateway alone)
Listens to  nobody
"""
