"""How the commands reach the router: one GET with the standard library, because httpx is slow to import."""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from herd.console import spelling, tables
from herd.errors import HerdError, NotReachable

TIMEOUT_S: Final = 10.0
_WILDCARDS: Final = frozenset({"", "*", "0.0.0.0", "::", "[::]"})

Command = Callable[[argparse.Namespace], int]


class NotARouter(HerdError):
    """Something answered, but not as herd does."""


def command(run: Command) -> Command:
    """Turn what a person must know into one sentence on standard error and exit code 1."""

    @functools.wraps(run)
    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except HerdError as error:
            complain(str(error))
            return 1
        except BrokenPipeError:
            # `herd traces | head`: whoever read has seen enough. Keep the interpreter's own flush quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return guarded


def complain(sentence: str) -> None:
    """Say something beside the result."""
    sys.stderr.write(tables.clean(sentence) + "\n")


def print_json(value: object) -> None:
    tables.write([json.dumps(value, indent=2, ensure_ascii=True)])


def base_url(args: argparse.Namespace) -> str:
    """Where the router is asked; one that listens everywhere is asked on loopback."""
    host = reachable_host(args.host)
    return f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"


def reachable_host(host: str | None) -> str:
    return "127.0.0.1" if host is None or host in _WILDCARDS else host.strip("[]")


def fleet_status(args: argparse.Namespace) -> dict[str, Any]:
    """The answer of /fleet/status. Raises NotReachable, or HerdError for an answer that is not one."""
    status = get(args, "/fleet/status")
    if not isinstance(status, dict) or "fleet" not in status or "nodes" not in status:
        raise _not_a_router(args)
    return status


def get(args: argparse.Namespace, target: str) -> object:
    """What the router answers, decoded from JSON. Raises NotReachable when nobody does."""
    with _asked(args, "GET", target, None, TIMEOUT_S) as response:
        return _answer(args, response)


def post(args: argparse.Namespace, target: str, body: object, timeout_s: float) -> object:
    """The same for a call that changes something, however long it may take."""
    with _asked(args, "POST", target, body, timeout_s) as response:
        return _answer(args, response)


def post_for_events(
    args: argparse.Namespace, target: str, body: object, timeout_s: float
) -> Iterator[dict[str, Any]]:
    """The events of the answer, as they come. `timeout_s` is the longest silence."""
    with _asked(args, "POST", target, body, timeout_s) as response:
        if response.status != http.client.OK:
            _answer(args, response)
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


@contextmanager
def _asked(
    args: argparse.Namespace, method: str, target: str, body: object, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(reachable_host(args.host), args.port, timeout=timeout_s)
    headers = {"Accept": "application/json"}
    try:
        if body is None:
            connection.request(method, target, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request(method, target, json.dumps(body), headers)
        yield connection.getresponse()
    except http.client.HTTPException as error:
        raise _not_a_router(args) from error
    except OSError as error:
        raise NotReachable(_nobody(args, error)) from error
    finally:
        connection.close()


def _answer(args: argparse.Namespace, response: http.client.HTTPResponse) -> object:
    try:
        answer = json.loads(response.read())
    except (ValueError, RecursionError) as error:
        raise _not_a_router(args) from error
    if response.status != http.client.OK:
        raise HerdError(f"The router at {base_url(args)} answered {response.status}: {_message(answer)}.")
    return answer


def _nobody(args: argparse.Namespace, error: OSError) -> str:
    why = "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or str(error))
    start = spelling.command("herd")
    return (
        f"No router answers at {base_url(args)} ({why}); start one with `{start}`,"
        " or name another with --host and --port."
    )


def _not_a_router(args: argparse.Namespace) -> NotARouter:
    return NotARouter(
        f"What answers at {base_url(args)} is not a herd router; name another with --host and --port."
    )


def _message(answer: object) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text).rstrip(".")
