"""Ollama's dialect spoken by llama.cpp and OpenAI-compatible servers, and answers folded for callers who want
no stream (docs/compatibility.md).

Sans-I/O: bytes in, bytes out; the gateway moves them. What may not happen here: reading a clock, sending,
guessing. A field that cannot be honoured is refused with a sentence, never dropped in silence.
"""

from __future__ import annotations

from herd_node.translate.base import (
    Answer,
    Call,
    ModelFacts,
    Question,
    Reader,
    Refusal,
    Truncated,
    model_digest,
)
from herd_node.translate.errors import honest_error, reclassify, translate_error
from herd_node.translate.folding import fold
from herd_node.translate.requests import translate

__all__ = [
    "Answer",
    "Call",
    "ModelFacts",
    "Question",
    "Reader",
    "Refusal",
    "Truncated",
    "fold",
    "honest_error",
    "model_digest",
    "reclassify",
    "translate",
    "translate_error",
]
