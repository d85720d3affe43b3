"""Every message that crosses a process boundary, and where it travels.

`envelope.py` is the CloudEvents frame. `identity.py`, `models.py`, `endpoints.py`, `inference.py`
each hold one owner's commands, public state and events. `subjects.py` maps a type to its subject
and stream, and says who may publish and read what. `registry.py` finds the struct of a type name.
"""
