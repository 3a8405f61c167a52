"""What a model is for: code, vision, reasoning or general. The one table, and where it comes from.

Only used to find a loaded model in place of one that would have to be loaded (docs/scheduling.md §3). A model
that is taken for a general one by mistake does little harm: a stand-in must have all that the model has.

Sources. Names: what the models call themselves on their cards (ollama.com/library/NAME, huggingface.co).
Families: the architectures in llama.cpp's `src/llama-arch.cpp`; Ollama shows them as `details.family`, and
calls one of them `gptoss`. Capabilities: docs/backends.md.
"""

from __future__ import annotations

import re
from typing import Literal

from herd.fleet.snapshot import ModelName

Category = Literal["general", "code", "reasoning", "vision"]

#: The words that an agent reports for a model of which its backend says nothing. No model has them all.
_SAYS_NOTHING = frozenset({"completion", "embedding", "thinking", "tools", "vision"})

#: Made for code, by a part of the name. `coder`: deepseek-, qwen2.5-, qwen3-, star-, deepcoder and more.
_CODE_NAMES = re.compile(
    r"(?<!de)(?<!en)coder|opencoder|codellama|code-llama|codegemma|codeqwen|codestral|codegeex|codebooga|codeup"
    r"|-code-|stable-code|granite-code|devstral|magicoder|duckdb-nsql|swe-(?:agent|dev)|starchat"
)
_CODE_FAMILIES = frozenset({"starcoder", "starcoder2", "codeshell", "refact"})

#: Thinks before it answers, by a part of the name: for backends that do not say `thinking`.
_REASONING_NAMES = re.compile(
    r"deepseek-r1|deepseek-v3\.1|\bqwq\b|gpt-oss|magistral|marco-o1|openthinker|smallthinker|deepscaler"
    r"|exaone-deep|reasoning|thinking|\bcogito\b"
)
_REASONING_FAMILIES = frozenset({"gptoss", "gpt-oss", "smallthinker"})


def words_of(name: ModelName) -> frozenset[str] | None:
    """What the model itself can do; None where that is not known. Endpoints are those of its backend."""
    words = frozenset([word for word in name.capabilities if not word.startswith("/")])
    return None if not words or words >= _SAYS_NOTHING else words


def category_of(name: ModelName) -> Category | None:
    """The first that fits: made for code, sees, thinks, anything else. None where nothing is known of it."""
    words = words_of(name)
    if words is None or "completion" not in words:
        return None
    if name.family in _CODE_FAMILIES or _CODE_NAMES.search(name.canonical):
        return "code"
    if "vision" in words:
        return "vision"
    thinks = "thinking" in words or name.family in _REASONING_FAMILIES
    if thinks or _REASONING_NAMES.search(name.canonical):
        return "reasoning"
    return "general"
