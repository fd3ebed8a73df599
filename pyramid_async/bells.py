"""The bells of Celery workers, messages with a job's id and nothing else, and who sends them."""

from __future__ import annotations

import logging
import math
import queue
import struct
import threading
import time
from typing import Any, NamedTuple
from uuid import uuid4

from celery import Celery
from kombu import Connection, Producer
from kombu.exceptions import ChannelError

log = logging.getLogger(__name__)

# The tasks that a message can name: whoever answers the first may run the job at once, for nobody
# else has heard of it; whoever answers the second claims it first.
BELL = "pyramid_async.bell"
AGAIN = "pyramid_async.again"

# How a broker that is there and takes other bells refuses a queue.  The client finds out by itself
# that a name is too long for the protocol.  Redis refuses none: what it answers is wrong with the
# whole server.
REFUSALS = (struct.error, ChannelError)

# Longest time that publishing may wait for a broker, seconds.
BROKER_TIMEOUT = 1.0

# Seconds after which the broker is asked whether it got what was sent.
CONFIRM = 0.1

# Seconds after which a process rings again for a job that nobody began.
PAUSE = 30.0

# Seconds that a job may be passed over because other bells still wait in its queue.
PASSED_OVER = 300.0

# Seconds for which the length of a queue is taken as known.
LENGTH_KNOWN = 1.0

app = Celery("pyramid_async", set_as_current=False)
# Nothing but an id passes, one way.
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_proc_alive_timeout=60.0,  # making the application takes longer than 4 s
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # a broker may be away for long
    # RabbitMQ closes the channel where a bell waited behind a long job for its consumer_timeout.
    broker_channel_error_retry=True,
)


@app.on_after_finalize.connect(weak=False)
def leave_the_bell_alone(**_: Any) -> None:
    """Take out Celery's own tasks, which whoever can write to the broker could call."""
    for name in list(app.tasks):
        if name not in (BELL, AGAIN):
            app.tasks.unregister(name)


class Ring(NamedTuple):
    """One message to be sent: the id of a job, the queue and the task."""

    sid: str
    queue: str
    bell: str
    most_waiting: int | None = None  # only if the queue has no more: the job's own may wait
    viewed: float = math.inf  # when the job was seen to be nobody's: its own is older, monotonic


class Bells:
    """Publishes: a thread of its own, a bounded queue and short time-outs.

    It drops what it cannot pass on: recovery rings again for jobs that nobody began.
    """

    def __init__(self, url: str, default_queue: str, most: int) -> None:
        self.url = url
        self.default_queue = default_queue
        self.most = most
        self.stopped = threading.Event()
        self._waiting: queue.SimpleQueue[Ring | None] = queue.SimpleQueue()
        self._rung: dict[str, float] = {}  # sid -> when, monotonic
        # Sid -> since when, and when for the last time, monotonic.
        self._passed_over: dict[str, tuple[float, float]] = {}
        self._lengths: dict[str, tuple[float, int]] = {}  # queue -> (when, messages in it)
        self._empty: dict[str, float] = {}  # queue -> when it was seen to be, monotonic
        self._connection: Any = None
        self._producer: Any = None  # of that connection
        self._declared: set[str] = set()  # queues, by that connection
        self._refused: dict[str, float] = {}  # queue -> when the broker refused it, monotonic
        self._unconfirmed: list[Ring] = []  # taken since the broker answered
        self._confirmed = 0.0  # when it did, monotonic
        self._thread = threading.Thread(target=self._work, name="pyramid_async-bells", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def room(self) -> int:
        return max(0, self.most - self._waiting.qsize())

    def rung(self, sid: str) -> bool:
        """Say whether we rang for the job a moment ago."""
        return time.monotonic() - self._rung.get(sid, -PAUSE) < PAUSE

    def ring(
        self,
        sid: str,
        queue_name: str | None,
        bell: str,
        most_waiting: int | None = None,
        viewed: float = math.inf,
    ) -> None:
        """Have a message sent; never wait."""
        if self.room():  # else recovery rings later
            queue_name = queue_name or self.default_queue
            self._note(sid)  # first: the thread may have dropped it a moment later
            self._waiting.put(Ring(sid, queue_name, bell, most_waiting, viewed))

    def stop(self, timeout: float) -> None:
        """Send what waits, for *timeout* seconds at most."""
        self.stopped.set()
        self._waiting.put(None)  # wakes the thread
        self._thread.join(timeout)

    def _note(self, sid: str) -> None:
        if len(self._rung) > self.most:
            self._rung.clear()  # at worst a bell is rung twice
        self._rung[sid] = time.monotonic()

    # -- the thread

    def _work(self) -> None:
        while self._next():
            pass
        self._disconnect()

    def _next(self) -> bool:
        """Pass on the next bell, or see to those that were; return False at the end."""
        ring = self._take()
        try:
            self._pass_on([] if ring is None else [ring])
        except Exception as error:
            self._drop(error)
            return not self.stopped.wait(BROKER_TIMEOUT)
        return not (self.stopped.is_set() and self._waiting.empty())

    def _take(self) -> Ring | None:
        """Return the next bell, or None: no other comes soon."""
        try:
            return self._waiting.get(timeout=CONFIRM if self._unconfirmed else None)
        except queue.Empty:
            return None

    def _pass_on(self, rings: list[Ring]) -> None:
        self._unconfirmed += rings
        used_before = self._connection is not None
        try:
            self._send(rings)
        except Exception:
            self._disconnect()
            if not used_before:
                raise
            # A broker that was restarted, or a firewall, had closed it: no reason to drop a bell.
            # It may have got them for all that.
            self._send([ring._replace(bell=AGAIN) for ring in self._unconfirmed])

    def _drop(self, error: Exception) -> None:
        self._disconnect()
        sids = [ring.sid for ring in self._unconfirmed]
        self._unconfirmed.clear()
        for sid in sids:
            self._rung.pop(sid, None)
        log.warning(
            "bells were dropped, %d, the first for job %r; recovery will ring them: %r",
            len(sids),
            sids[0],
            error,
        )

    def _send(self, rings: list[Ring]) -> None:
        """Publish bells, and ask the broker about them now and then."""
        for ring in rings:
            if time.monotonic() - self._refused.get(ring.queue, -PAUSE) < PAUSE:
                continue  # it stays noted as rung, so recovery does not ask at each look
            try:
                self._send_one(ring)
            except REFUSALS as error:
                self._refuse(ring, error)
        if not rings or time.monotonic() - self._confirmed >= CONFIRM:
            self._confirm()

    def _send_one(self, ring: Ring) -> None:
        if ring.most_waiting is not None and self._others_wait(ring, ring.most_waiting):
            self._rung.pop(ring.sid, None)
        else:
            self._passed_over.pop(ring.sid, None)
            self._publish(ring)

    def _refuse(self, ring: Ring, error: Exception) -> None:
        """Leave out the bells of a queue for a while; RabbitMQ's client has a new channel."""
        if len(self._refused) > self.most:
            self._refused.clear()
        self._refused[ring.queue] = time.monotonic()
        log.warning(
            "the broker refuses the queue %r of job %r, whose bells are left out for %d s: %r",
            ring.queue,
            ring.sid,
            PAUSE,
            error,
        )

    def _publish(self, ring: Ring) -> None:
        """Send a message of Celery's protocol 2, with what our workers heed of it.

        ``send_task`` adds a dozen headers, and takes four times as long.
        """
        producer = self._connected()
        if ring.queue not in self._declared:
            self._declare(ring.queue)
        producer.publish(
            ((ring.sid,), {}, {}),
            routing_key=ring.queue,
            headers={"lang": "py", "task": ring.bell, "id": uuid4().hex},
            serializer="json",  # whatever the process has made kombu's default
        )

    def _confirm(self) -> None:
        """Have the broker answer, which tells that it got what was sent before."""
        if self._unconfirmed:
            # RabbitMQ takes one thing after the other; Redis has answered each message.
            self._connected().channel.basic_qos(0, 0, False)
            self._unconfirmed.clear()
        self._confirmed = time.monotonic()

    def _others_wait(self, ring: Ring, most: int) -> bool:
        """Say whether the queue is still being worked off, the job's own bell in it.

        Every process looks for jobs that nobody began: while the workers are behind or down,
        they would fill the queue with copies.  Where it holds more messages than *most*, the
        number of such jobs (in all queues), copies are among them, and no more are made.
        """
        length = self._length(ring.queue)
        if not length:
            return False
        if len(self._passed_over) > self.most:
            self._passed_over.clear()
        now = time.monotonic()
        since, _ = self._passed_over.get(ring.sid, (now, now))
        self._passed_over[ring.sid] = since, now
        # Many bells were lost: the first of those that replace them must not keep out the others.
        lost = ring.viewed <= self._empty.get(ring.queue, -math.inf)
        if length > most or not (lost or now - since >= PASSED_OVER):
            return True
        self._lengths[ring.queue] = self._lengths[ring.queue][0], length + 1
        return False

    def _length(self, queue_name: str) -> int:
        when, length = self._lengths.get(queue_name, (-LENGTH_KNOWN, 0))
        if time.monotonic() - when >= LENGTH_KNOWN:
            length = self._declare(queue_name)
            self._lengths[queue_name] = when, _ = time.monotonic(), length
            if not length:
                self._empty[queue_name] = when
            self._forget_begun()
        return length

    def _forget_begun(self) -> None:
        """Forget the jobs that recovery asks for no longer."""
        recent = time.monotonic() - PASSED_OVER
        kept = {sid: times for sid, times in self._passed_over.items() if times[1] >= recent}
        self._passed_over = kept

    def _declare(self, queue_name: str) -> int:
        """Make the queue where it is missing; return the number of messages in it."""
        channel = self._connected().channel
        declared = app.amqp.queues.new_missing(queue_name)(channel).queue_declare()
        self._declared.add(queue_name)
        return int(declared.message_count)

    def _connected(self) -> Any:
        """Return a producer of messages with a connection."""
        if self._connection is None:
            connection = connect(self.url)
            self._producer = Producer(connection.default_channel)
            self._connection = connection
        return self._producer

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._declared.clear()
        if connection is not None:
            try:
                connection.release()
            except Exception as error:
                log.debug("the broker's connection did not close: %r", error)


def transport(url: str) -> Any:
    """Return kombu's class for such brokers; raise what kombu does, or an import, for none."""
    return Connection(url).get_transport_cls()


def connect(url: str) -> Any:
    """Return a connection to the broker on which nothing waits longer than BROKER_TIMEOUT."""
    options = time_outs(url, BROKER_TIMEOUT)
    # Each try is at the next URL of a list.
    options.update(max_retries=max(1, url.count(";")), interval_start=0, interval_step=0)
    # No heartbeat: nobody would send it while there is nothing to publish.
    return app.connection_for_write(
        url, connect_timeout=BROKER_TIMEOUT, heartbeat=0, transport_options=options
    )


def time_outs(url: str, seconds: float) -> dict[str, Any]:
    """Return the options of a connection on which no answer is waited for any longer."""
    names = ["read_timeout", "write_timeout"]
    if url.startswith("redis"):
        # It has no heartbeat: the client asks in its place.
        names = ["socket_timeout", "socket_connect_timeout", "health_check_interval"]
    return dict.fromkeys(names, seconds)
