"""Model names as Ollama's sentences spell them. Pure."""

from __future__ import annotations


def full_name(asked: str) -> str:
    """`registry.ollama.ai/library/x:latest`, as Ollama spells a name in full."""
    tagged = asked if ":" in asked.rpartition("/")[2] else f"{asked}:latest"
    missing = {0: "registry.ollama.ai/library/", 1: "registry.ollama.ai/"}
    return missing.get(tagged.count("/"), "") + tagged
