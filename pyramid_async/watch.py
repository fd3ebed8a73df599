"""What the connections of a try cannot load, and what they take no note of."""

from __future__ import annotations

from functools import partial
from typing import Any

from .failures import LASTING


class Watch:
    """Stands between a function's objects and their connections while a try lasts."""

    def __init__(self) -> None:
        self.unread: Exception | None = None  # what a load of an object raised
        self._connections: list[Any] = []
        self._unwritten: list[Any] = []  # objects that changed where there was no transaction

    def begin(self, connection: Any) -> None:
        """Watch a connection, if there is one, and those to other databases that it opens."""
        if connection is None or connection in self._connections:
            return
        self._connections.append(connection)
        kind = type(connection)
        connection.setstate = partial(self._load, kind.setstate, connection)
        connection.get = partial(self._load, kind.get, connection)
        connection.get_connection = partial(self._open, kind.get_connection, connection)
        connection.register = partial(self._register, kind.register, connection)

    def end(self) -> None:
        for connection in self._connections:
            del connection.setstate, connection.get, connection.get_connection, connection.register
        for obj in self._unwritten:
            obj._p_invalidate()

    def _open(self, method: Any, connection: Any, name: str) -> Any:
        found = method(connection, name)
        self.begin(found)
        return found

    def _load(self, method: Any, connection: Any, argument: Any) -> Any:
        try:
            return method(connection, argument)
        except LASTING:
            raise  # the function may expect it, and it tells the truth
        except Exception as error:
            self.unread = error
            raise

    def _register(self, method: Any, connection: Any, obj: Any) -> None:
        try:
            method(connection, obj)
        except Exception:
            # Mappings and trees have changed by now, and no abort knows of it: who gets the
            # connection from its pool next would see that, and commit it some day.
            self._unwritten.append(obj)
            raise
