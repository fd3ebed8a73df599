"""What a Celery worker takes of what is in the broker: the bells of its queue, nothing else."""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import Celery
from kombu.utils.imports import symbol_by_name

from .bells import AGAIN, BELL, app, connect, time_outs

log = logging.getLogger(__name__)

# What Celery's messages may name besides: other tasks that the worker would send on.
LINKS = {"callbacks", "errbacks", "chain", "chord"}

# What may be the id of a message; ours and Celery's are UUIDs.
MESSAGE_ID = re.compile("[0-9A-Za-z-]{1,36}")

# What a client raises at what is in the broker and no message at all, or one that it cannot read.
UNREADABLE = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)

# Longest time that a worker waits for an answer of its broker, and how often it asks for a sign of
# life, seconds.
WORKER_TIMEOUT = 10.0

# Seconds until a worker connects again to a broker that told it what is wrong (a queue has other
# arguments, say).  Celery does so at once, and again for ever.
REFUSED_PAUSE = 1.0

# What RabbitMQ calls an operation that a quorum queue does not know.
NOT_IMPLEMENTED = 540


def listen(url: str, queue_name: str) -> None:
    """Let Celery's workers take bells from there, and notice when a connection is dead.

    A firewall that forgot it swallows everything, and TCP says nothing to who only listens.
    """
    app.conf.update(
        broker_url=url,
        task_default_queue=queue_name,
        broker_heartbeat=WORKER_TIMEOUT,
        broker_transport_options=time_outs(url, WORKER_TIMEOUT),
    )


def take_bells_alone(consumer: Any) -> Any:
    """Return a class like Celery's consumer, or its dotted name, that refuses what is no bell.

    Celery ends the worker at some malformed messages, and the next worker at the same one.
    """
    base: Any = symbol_by_name(consumer)

    class Consumer(base):
        loop: Any

        def start(self) -> None:
            self.loop = going_on(self.loop)
            super().start()

        def create_task_handler(self, *args: Any, **kw: Any) -> Callable[[Any], None]:
            return bells_alone(super().create_task_handler(*args, **kw))

        def on_connection_error_before_connected(self, error: Exception) -> None:
            super().on_connection_error_before_connected(error)
            time.sleep(REFUSED_PAUSE)

        def on_connection_error_after_connected(self, error: Exception) -> None:
            super().on_connection_error_after_connected(error)
            code = getattr(error, "reply_code", None)
            if code == NOT_IMPLEMENTED:
                # Of a virtual host of quorum queues, which know no common prefetching.
                for each in self.app.amqp.queues.consume_from.values():
                    each.queue_arguments = {"x-queue-type": "quorum"}
            if isinstance(error, Unreadable):
                purge(self.app)
            elif code or isinstance(error, self.channel_errors):  # Redis gives no code
                time.sleep(REFUSED_PAUSE)

    return Consumer


class Unreadable(ConnectionError):
    """The client cannot read a message (why)."""


def going_on(loop: Callable[..., None]) -> Callable[..., None]:
    """Return Celery's loop, but one that connects again where the client cannot read a message.

    It would end the worker, which waits for its jobs first, and takes no others meanwhile.
    """

    def go_on(*args: Any) -> None:
        try:
            loop(*args)
        except UNREADABLE as error:
            raise Unreadable(f"a message that is none: {error!r:.200}") from error

    return go_on


def purge(worker: Celery) -> None:
    """Take all bells away, where a message that nobody can read is the first one again.

    Recovery rings again for the jobs.  In Redis such a message is gone.
    """
    with suppress(Exception), connect(worker.conf.broker_url) as connection:
        if connection.transport.driver_type == "amqp":
            for name in worker.amqp.queues.consume_from:
                connection.default_channel.queue_purge(name)


def bells_alone(handle: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a function that hands bells on, with none of the headers that Celery would obey."""

    def receive(message: Any) -> None:
        try:
            headers = headers_of_bell(message)
        except Exception as error:
            log.warning("a message that is no bell is refused: %.200r", error)
            message.reject_log_error(log, (Exception,))
        else:
            message.headers = headers
            handle(message)

    return receive


def headers_of_bell(message: Any) -> dict[str, str]:
    """Return the headers that a bell must have, or raise an error."""
    args, kw, embedded = message.payload
    task, number = message.headers["task"], message.headers["id"]
    # Celery writes the id into the log as it is.
    if task not in (BELL, AGAIN) or not MESSAGE_ID.fullmatch(number):
        raise ValueError(task, number)
    if not isinstance(args, list) or len(args) != 1 or kw != {}:
        raise ValueError(args, kw)
    if not embedded.keys() <= LINKS or any(embedded.values()):
        raise ValueError(embedded)
    return {"lang": "py", "task": task, "id": number}
