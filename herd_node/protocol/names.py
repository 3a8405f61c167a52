"""Names as both programs compare, admit and show them: models, nodes, and any text in a header."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

_PREFIXES = ("registry.ollama.ai/library/", "library/")
_LATEST = ":latest"
_LOCAL_SOURCE = ":local"
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

MAX_MODEL_NAME_CHARS = 200
_MARKUP = re.compile(r"""[<>"'&\\;%{}]""")
#: What nearly every real name is made of, so that only strange ones are looked at character by character.
_ORDINARY = re.compile(r"[A-Za-z0-9._:/@+-]+")
_DOTS = re.compile(r"(?:^|[/:])\.\.(?:$|[/:])")

_HUBS = ("hf.co/", "huggingface.co/")

_NODE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NOT_IN_NODE_ID = re.compile(r"[^A-Za-z0-9._-]")
_LOCAL = re.compile(r"\.local\.?$", re.IGNORECASE)

#: Every printable ASCII character but the one that starts an escape.
_PLAIN_IN_HEADERS = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def canonical(name: str) -> str:
    """The form in which model names are compared; twice is the same as once.

    Ollama's default registry and library are cut, ASCII letters are lower case, a trailing `:latest` is cut,
    and so is `:local` behind a tag, which only says that no cloud is meant.
    Other scripts stay as they are: their lower case depends on the language.
    """
    name = name.lower() if name.isascii() else name.translate(_ASCII_LOWER)
    while True:
        shorter = name
        for prefix in _PREFIXES:
            shorter = shorter.removeprefix(prefix)
        shorter = shorter.removesuffix(_LATEST)
        if shorter.endswith(_LOCAL_SOURCE) and shorter.rpartition("/")[2].count(":") > 1:
            shorter = shorter.removesuffix(_LOCAL_SOURCE)
        if not shorter or shorter == name:
            return name
        name = shorter


def source_of(name: str) -> Literal["url", "hub", "registry"]:
    """Where a model of that name is pulled from: a file's URL, Hugging Face, or a registry as Ollama's."""
    name = name.lower()
    if name.startswith(("http://", "https://")):
        return "url"
    return "hub" if name.startswith(_HUBS) else "registry"


def is_model_name(name: object) -> bool:
    """1-200 characters of any script; nothing that acts as markup or as a path upwards, nothing invisible."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_MODEL_NAME_CHARS:
        return False
    if not _ORDINARY.fullmatch(name) and (_MARKUP.search(name) or any(map(_is_invisible, name))):
        return False
    return ".." not in name or not _DOTS.search(name)


def _is_invisible(character: str) -> bool:
    """Control, format, half of a surrogate pair, or any kind of space."""
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs") or category[0] == "Z"


def is_node_id(text: object) -> bool:
    """1-64 of A-Z a-z 0-9 . _ - ; not `.` or `..`, because a node id is also the name of a folder."""
    return isinstance(text, str) and _NODE_ID.fullmatch(text) is not None and text not in (".", "..")


def legal_node_id(hostname: str) -> str:
    """The node id that a host gets when nobody names one: `.local` cut, every other character a `-`."""
    legal = _NOT_IN_NODE_ID.sub("-", _LOCAL.sub("", hostname.strip()))[:64]
    return legal if any(character.isalnum() for character in legal) else "node"


@lru_cache(4096)  # each answer says the same few models
def header_value(text: str) -> bytes:
    """`text` for an HTTP header: what is not printable ASCII, `%`, and spaces at either end become %XX."""
    value = quote(text, safe=_PLAIN_IN_HEADERS, errors="surrogatepass")
    inner = value.strip(" ")
    if inner != value:
        before = len(value) - len(value.lstrip(" "))
        value = "%20" * before + inner + "%20" * (len(value) - len(inner) - before)
    return value.encode("ascii")
