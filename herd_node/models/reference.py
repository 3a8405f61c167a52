"""What a GGUF file is pulled by: a URL, or a repository of Hugging Face. Pure.

`hf.co/ORG/REPO:QUANT`, `hf.co/ORG/REPO:FILE.gguf`, `hf.co/ORG/REPO`; `https://HOST/…/FILE.gguf`. A model that
was pulled answers to the name it was asked by, so that name holds neither a query nor credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from herd_node.protocol.names import is_model_name, source_of

#: Without a quantisation, these are looked for, then any; as llama.cpp does.
USUAL_QUANTS = ("Q4_K_M", "Q8_0")
MAX_URL_CHARS = 2048

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,150}\.gguf", re.IGNORECASE)
_PART_OF_MANY = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf$", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Files beside a model that are none: projectors, importance matrices, draft heads.
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")


class BadReference(ValueError):
    """It names nothing that could be pulled; `str()` is a sentence for the caller."""


class UrlReference(NamedTuple):
    """`name` is the URL without what might be secret in it; "" where that is no model's name."""

    url: str
    file_name: str
    name: str


class HubReference(NamedTuple):
    """`tag` is a quantisation, a file's name, or ""."""

    repo: str
    tag: str
    name: str


Reference = UrlReference | HubReference


class HubFile(NamedTuple):
    """One file of a repository. `sha256` of its content, where the hub says it."""

    path: str
    size_bytes: int | None
    sha256: str | None


def parse_reference(text: str) -> Reference:
    """Raises BadReference."""
    match source_of(text):
        case "url":
            return _url(text)
        case "hub":
            return _hub(text)
    raise BadReference(
        "a llama.cpp node pulls GGUF files, by URL (https://HOST/FILE.gguf) or from Hugging Face "
        "(hf.co/ORG/REPO:QUANT); names of Ollama's registry are for Ollama nodes"
    )


def _url(text: str) -> UrlReference:
    if len(text) > MAX_URL_CHARS or not text.isascii() or any(c <= " " or c == "\x7f" for c in text):
        raise BadReference("the URL is too long, or has characters that no URL has")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        raise BadReference("the URL cannot be read") from None
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise BadReference("the URL must name a host, and hold no user name or password")
    path = parts.path
    if parts.hostname in ("huggingface.co", "hf.co"):
        path = path.replace("/blob/", "/resolve/", 1)  # what a browser shows
    file_name = file_name_of(unquote(path))
    plain = urlunsplit((parts.scheme.lower(), parts.netloc, path, "", ""))
    url = urlunsplit((parts.scheme.lower(), parts.netloc, path, parts.query, ""))
    return UrlReference(url, file_name, plain if is_model_name(plain) else "")


def _hub(text: str) -> HubReference:
    repo, _, tag = text.partition("/")[2].partition(":")
    if tag.lower() == "latest":
        tag = ""
    if not _REPO.fullmatch(repo) or ".." in repo or (tag and not _TAG.fullmatch(tag)):
        raise BadReference(
            "a model on Hugging Face is named hf.co/ORG/REPO, with :QUANT (Q4_K_M) where there are several"
        )
    return HubReference(repo, tag, f"hf.co/{repo}" + (f":{tag}" if tag else ""))


def file_name_of(path: str) -> str:
    """The name under which the file will lie in the folder. Raises BadReference."""
    name = path.rpartition("/")[2]
    if not _FILE.fullmatch(name) or ".." in name:
        raise BadReference("it must end in a plain file name with .gguf")
    if _PART_OF_MANY.search(name):
        raise BadReference("the model is split over several files, which agents do not pull")
    return name


def is_model_file(path: str) -> bool:
    """A GGUF that can be served by itself."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not any(word in name for word in _NO_MODELS)


def hub_list_url(hub: str, reference: HubReference) -> str:
    return f"{hub}/api/models/{reference.repo}/tree/main?recursive=true"


def hub_file_url(hub: str, reference: HubReference, file: HubFile) -> str:
    return f"{hub}/{reference.repo}/resolve/main/{quote(file.path)}"


def hub_files(listed: object) -> tuple[HubFile, ...]:
    """The GGUF files of the hub's list of a repository."""
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    found = []
    for entry in entries:
        path, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
        if entry.get("type") != "file" or not isinstance(path, str) or not is_model_file(path):
            continue
        if ".." in path.split("/") or path.startswith("/"):
            continue
        oid = lfs.get("oid") if isinstance(lfs, dict) else None
        found.append(HubFile(path, size if type(size) is int and size > 0 else None, sha256_in(oid)))
    return tuple(found)


def choose(files: Sequence[HubFile], reference: HubReference) -> HubFile:
    """The file that the tag means; without one the usual, else the first. Raises BadReference."""
    if not files:
        raise BadReference(f"there is no GGUF file in {reference.repo} on Hugging Face")
    if reference.tag.lower().endswith(".gguf"):
        wanted = (file for file in files if file.path.rpartition("/")[2].lower() == reference.tag.lower())
        found = next(wanted, None)
    else:
        found = _by_quant(files, (reference.tag,) if reference.tag else USUAL_QUANTS)
    if found is None and reference.tag:
        raise BadReference(f"there is no {reference.tag} in {reference.repo}; there is {_quants(files)}")
    return found or files[0]


def _by_quant(files: Sequence[HubFile], quants: Iterable[str]) -> HubFile | None:
    for quant in quants:
        pattern = re.compile(rf"(?:^|[/._-]){re.escape(quant)}[.-]", re.IGNORECASE)
        for file in files:
            if pattern.search(file.path):
                return file
    return None


def _quants(files: Sequence[HubFile]) -> str:
    names = [file.path.rpartition("/")[2] for file in files]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def sha256_in(text: object) -> str | None:
    """Of an ETag or an object id that is one; a strong ETag only."""
    if not isinstance(text, str):
        return None
    plain = text.strip().strip('"').lower()
    return plain if _SHA256.fullmatch(plain) else None
