"""`python -m tests.clients.programs CLIENT URL`: a JSON line with a deed in, one with its outcome out.

`{"deed": "chat", "model": …}` is answered with `{"value": …}`, or `{"trouble": traceback}`. `begin` opens a
stream and is answered after its first piece; `leave` ends that stream as a user of this client would.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

from tests.clients.programs.base import Client, stay_at_home


def main() -> None:
    say = os.dup(1)
    os.dup2(2, 1)  # whatever a client prints is no outcome
    stay_at_home()
    name, url = sys.argv[1:]
    module = importlib.import_module(f"tests.clients.programs.with_{name.replace('-', '_')}")
    client: Client = module.Here(url)
    for line in sys.stdin:
        os.write(say, json.dumps(outcome(client, json.loads(line))).encode() + b"\n")


def outcome(client: Client, order: dict[str, Any]) -> dict[str, Any]:
    deed = order.pop("deed")
    try:
        if deed == "begin":
            client.leave = client.begin(**order)
            return {"value": None}
        return {"value": getattr(client, deed)(**order)}
    except Exception:
        return {"trouble": traceback.format_exc()}


if __name__ == "__main__":
    main()
