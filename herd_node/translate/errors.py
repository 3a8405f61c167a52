"""What a backend's error means to the caller: status and sentence. Pure."""

from __future__ import annotations


def translate_error(status: int, body: bytes, path: str) -> tuple[int, str]:
    """A llama-server error → the status and sentence of the Ollama answer."""
    raise NotImplementedError


def reclassify(kind: str, status: int, body: bytes) -> int:
    """For answers passed through as they came: the client's mistakes that a backend calls 5xx become 400."""
    raise NotImplementedError
