"""The child process: llama.cpp's own server, in process, for as long as its parent lives.

`python -m herd_node.backends.embedded_server`, one JSON line of configuration on standard input; one JSON
line `{"url": …}` on standard output once it listens. Then standard input is only watched: its end means that
the parent is gone, however it went, and this process ends at once, in the middle of a token if need be.

It imports nothing of the agent, so that it starts quickly and holds nothing but the model.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

PARENT_GONE = 0
#: Exit statuses with a meaning for the parent.
NO_ENGINE = 3
#: llama.cpp's physical batch, and what embeddings of up to 2,048 tokens need; docs/backends.md has the price.
SMALL_BATCH_TOKENS = 512
LARGE_BATCH_TOKENS = 2048
PROMPT_CACHE_MIB = 256
QUIET = 2  # warnings and errors


def main() -> None:
    # Ctrl-C reaches the whole terminal, a service manager's SIGTERM the whole group: the parent decides, so
    # that running answers are drained. When it is gone the pipe closes, and that ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "win32":
        os.set_blocking(0, True)
    say = _keep_stdout_clean()
    config = json.loads(_first_line())
    _die_with_parent_while_loading()
    try:
        import xllamacpp
    except ImportError as missing:
        sys.stderr.write(f"xllamacpp cannot be imported: {missing}\n")
        sys.stderr.flush()
        os._exit(NO_ENGINE)
    server = xllamacpp.Server(parameters(xllamacpp, config))  # returns when it listens; raises when it cannot
    _stop_dying_by_signal()
    os.write(say, json.dumps({"url": server.listening_address}).encode() + b"\n")
    while os.read(0, 4096):
        pass
    os._exit(PARENT_GONE)  # no destructors: they would wait for the answer in work


def parameters(xllamacpp: Any, config: dict[str, Any]) -> Any:  # noqa: ANN401 - the engine has no types
    """`model, alias, api_key, threads, slots, context_tokens` (of one slot), `batch_tokens`."""
    wanted = xllamacpp.CommonParams()
    wanted.model.path = config["model"]
    wanted.model_alias = {config["alias"]}
    wanted.hostnames = ["127.0.0.1"]
    wanted.port = 0
    wanted.api_keys = [config["api_key"]]
    wanted.n_parallel = config["slots"]
    wanted.n_ctx = config["slots"] * config["context_tokens"]
    # its threads spin: two of them on two busy cores are slower than one, by far
    wanted.cpuparams.n_threads = config["threads"]
    wanted.cpuparams_batch.n_threads = config["threads"]
    # one server for chat and embeddings
    wanted.embedding = True
    wanted.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    wanted.n_batch = config["batch_tokens"]
    wanted.n_ubatch = config["batch_tokens"]
    wanted.endpoint_slots = True
    wanted.ui = False
    # by default any web page might ask it, and its prompt cache may take 8 GiB
    wanted.cors_origins = "http://127.0.0.1"
    wanted.cors_origins_explicit = True
    wanted.cache_ram_mib = PROMPT_CACHE_MIB
    wanted.verbosity = QUIET
    return wanted


def _keep_stdout_clean() -> int:
    """A private copy of standard output; whatever the engine prints goes to the log instead."""
    say = os.dup(1)
    os.dup2(2, 1)
    return say


def _first_line() -> bytes:
    """Read byte by byte, so that nothing is left in a buffer that the watch below would miss."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(PARENT_GONE)
        line += byte
    return bytes(line)


if sys.platform == "win32":

    def _die_with_parent_while_loading() -> None:
        """Loading holds the interpreter's lock, so there the end of the pipe is seen only after it."""

    def _stop_dying_by_signal() -> None:
        pass

else:
    import fcntl

    def _die_with_parent_while_loading() -> None:
        """Loading holds the interpreter's lock all the time, so no thread of Python could watch the pipe.

        The kernel does it: SIGIO, whose default action ends the process, when the pipe's other end closes.
        """
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([0], [], [], 0)[0]:  # it closed before the kernel was asked
            os._exit(PARENT_GONE)

    def _stop_dying_by_signal() -> None:
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) & ~os.O_ASYNC)


if __name__ == "__main__":
    main()
