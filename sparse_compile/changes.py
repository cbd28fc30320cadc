"""Whether anything may have changed of what plans are decided by (``plan.py``) and that they do not show."""

from __future__ import annotations


class _Changes:
    number = 0


_changes = _Changes()


def changed() -> None:
    """Something did: what an op of a plan found out when it ran, say."""
    _changes.number += 1


def changes() -> int:
    """How often something did."""
    return _changes.number
