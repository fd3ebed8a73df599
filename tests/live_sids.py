"""Hooks for schemathesis: every other job that it asks for is one that there is."""

import json
import random
from pathlib import Path

import schemathesis

SIDS = json.loads(Path("sids.json").read_text())
CHOICE = random.Random(1)


@schemathesis.serializer("application/json-rpc")
def json_rpc(context, value):
    return json.dumps(value).encode()


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    if path_parameters and "sid" in path_parameters and CHOICE.random() < 0.5:
        # Some must be left for the others.
        some = SIDS[::3] if context.operation.method == "delete" else SIDS
        return {**path_parameters, "sid": CHOICE.choice(some)}
    return path_parameters
