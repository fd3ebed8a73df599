"""What a ZEO client needs for its commits to be believed."""

from __future__ import annotations

from typing import Any


def unwrapped(storage: Any) -> Any:
    """Return what a storage that transforms records (zc.zlibstorage and its like) wraps.

    Such a one has its ``base`` in itself, and passes on what it has not; a DemoStorage, whose
    changes are its own, has a ``changes`` too.
    """
    while "base" in vars(storage) and "changes" not in vars(storage):
        storage = storage.base
    return storage


def forget_oids_on_reconnect(storage: Any) -> None:
    """Make a ZEO client drop the oids that it fetched ahead whenever it connects anew.

    A restarted server hands them out again.  A client that gives an object of its own the oid
    of one that it has loaded disowns that one, and later changes to it are never stored,
    though their commits succeed (ZEO 6.2, ZODB 6.4; the crash test shows it).  Does nothing
    to other storages.
    """
    storage = unwrapped(storage)
    oids = getattr(storage, "_oids", None)
    connected = getattr(storage, "notify_connected", None)
    if oids is None or connected is None:
        return

    def notify_connected(*args: Any) -> Any:
        oids.clear()
        return connected(*args)

    storage.notify_connected = notify_connected
