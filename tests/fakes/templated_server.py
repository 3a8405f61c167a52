"""The embedded server with another chat template: the real llama.cpp, calling tools and thinking for real.

`python -m tests.fakes.templated_server`, one JSON line of the embedded server's configuration and `template`
(a file's path) on standard input; one JSON line `{"url": …}` once it listens. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    say = os.dup(1)
    os.dup2(2, 1)  # whatever the engine prints is no answer
    config = json.loads(sys.stdin.buffer.readline())
    import xllamacpp

    from herd_node.backends.embedded_server import parameters

    wanted = parameters(xllamacpp, config)
    wanted.chat_template = Path(config["template"]).read_text(encoding="utf-8")
    wanted.use_jinja = True
    server = xllamacpp.Server(wanted)
    os.write(say, json.dumps({"url": server.listening_address}).encode() + b"\n")
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
