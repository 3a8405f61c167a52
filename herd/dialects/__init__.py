"""The clients' dialects: how a request's head is read, how errors are written, when a stream is complete.

Pure. A dialect is a row of functions (`base.Dialect`); the pipeline in `herd.proxy` knows no dialect by name.
Some endpoints of OpenAI's are rows of their own, since their records and answers are unlike the others'.
Wire facts: docs/backends.md.
"""

from herd.dialects.anthropic import ANTHROPIC
from herd.dialects.base import Dialect, Ending, Parsed, Verdict
from herd.dialects.ollama import OLLAMA
from herd.dialects.openai import OPENAI
from herd.dialects.responses import RESPONSES
from herd.dialects.services import SERVICES
from herd.dialects.watch import StreamWatch
from herd_node.protocol.routes import FORWARDED, Route

DIALECTS: dict[str, Dialect] = {row.name: row for row in (OPENAI, OLLAMA, ANTHROPIC)}

_BY_KIND = {"responses": RESPONSES, "rerank": SERVICES, "image": SERVICES, "transcription": SERVICES}


def dialect_of(route: Route) -> Dialect:
    """The row that reads and writes what belongs to a route."""
    return _BY_KIND.get(route.kind) or DIALECTS[route.dialect]


#: The same for each forwarded path.
DIALECT_BY_PATH: dict[str, Dialect] = {route.path: dialect_of(route) for route in FORWARDED}

__all__ = [
    "ANTHROPIC",
    "DIALECTS",
    "DIALECT_BY_PATH",
    "OLLAMA",
    "OPENAI",
    "RESPONSES",
    "SERVICES",
    "Dialect",
    "Ending",
    "Parsed",
    "StreamWatch",
    "Verdict",
    "dialect_of",
]
