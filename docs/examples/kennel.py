"""A kennel: an eventsourcing application that views and jobs share, one object in each process.

Run it with ``gunicorn --threads 16 "kennel:main()"`` and POST to ``/`` to register a dog; a job
teaches it to sit.  ``python -m pytest -m services -k eventsourcing`` runs this very file, under
gunicorn and in Celery workers, and counts what the file ``log`` tells.
"""

import os

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from pyramid.config import Configurator

from pyramid_async import current_job

# -- the domain ----------------------------------------------------------------------------


class Dog(Aggregate):
    @event("Registered")
    def __init__(self, name):
        self.name, self.tricks = name, []

    @event("TrickAdded")
    def learn(self, trick):
        self.tricks.append(trick)


class Kennel(Application):
    def __init__(self, **kw):
        super().__init__(**kw)
        log("made")

    def register(self, name):
        dog = Dog(name)
        self.save(dog)
        return dog.id

    def teach(self, dog_id, trick):
        dog = self.repository.get(dog_id)
        dog.learn(trick)
        self.save(dog)

    def close(self):
        # Its finalizer closes it once more.
        if not self.closing.is_set():
            log("closed")
        super().close()


# -- the web application ---------------------------------------------------------------------


def kennel(registry):
    """Make the object; called once in each process, after any fork."""
    return Kennel(
        env={
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": "kennel.sqlite",
            "SQLITE_LOCK_TIMEOUT": "20",
        }
    )


def register(request):
    """The view: one event at once, the other by a job."""
    dog_id = request.kennel.register("Fido")
    sid = request.scheduler.schedule(teach, dog_id)
    log("served")
    return request.scheduler.accepted(sid)


def teach(dog_id):
    """The job: its events are in a database of their own, so it must bear to be run twice."""
    kennel = current_job().request.kennel
    if "sit" not in kennel.repository.get(dog_id).tricks:
        kennel.teach(dog_id, "sit")
    log("taught")


def log(what):
    """Note what happened in which process."""
    with open("log", "a") as file:
        file.write(f"{what} {os.getpid()}\n")


def main(global_config=None, **settings):
    with Configurator(settings=settings) as config:
        config.include("pyramid_async")
        config.add_application(kennel, name="kennel")
        config.add_route("home", "/")
        config.add_view(register, route_name="home")
        return config.make_wsgi_app()
