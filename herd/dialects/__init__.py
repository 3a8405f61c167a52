"""The clients' dialects: how a request's head is read, how errors are written, when a stream is complete.

Pure. A dialect is a row of functions (`base.Dialect`); the pipeline in `herd.proxy` knows no dialect by name.
Wire facts: docs/backends.md.
"""

from herd.dialects.base import Dialect, Ending, Parsed, StreamWatch, Verdict
from herd.dialects.ollama import OLLAMA
from herd.dialects.openai import OPENAI

DIALECTS: dict[str, Dialect] = {OPENAI.name: OPENAI, OLLAMA.name: OLLAMA}

__all__ = ["DIALECTS", "OLLAMA", "OPENAI", "Dialect", "Ending", "Parsed", "StreamWatch", "Verdict"]
