"""The fake Ollama's store: blobs, pull, push, create, copy, delete, in recorded shapes and words.

Its registry has `library/tiny` on `127.0.0.1:5999`, which the recordings were made with; `bad` there is not
what its digest says, everything else does not exist. The registry of the world is unreachable.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import orjson

from tests.fakes.model import JSON_UTF8, FakeModel, Reply, dumps
from tests.fakes.recordings import recording

MANAGED = ("/api/pull", "/api/push", "/api/create", "/api/copy")
BLOBS = "/api/blobs/"
REGISTRY = "127.0.0.1:5999/"
_MODELS_DIR = "/srv/models/ollama"
_NO_SUCH_HOST = "dial tcp: lookup registry.ollama.ai on 203.0.113.253:53: no such host"


class Lines(NamedTuple):
    """An answer that comes line by line; `made` is the model that there is when the last one was sent."""

    lines: tuple[bytes, ...]
    made: FakeModel | None = None


class Store:
    """`models` is the fake's own list, which changes here."""

    def __init__(self, models: list[FakeModel]) -> None:
        self._models = models
        self.blobs: dict[str, bytes] = {}

    # -- blobs

    def head_blob(self, digest: str) -> Reply:
        if not _is_digest(digest):
            return Reply(400, JSON_UTF8, dumps({"error": "invalid digest format"}))
        if digest in self.blobs or any(f"sha256:{model.weights}" == digest for model in self._models):
            return Reply(200, "", b"")
        return Reply(404, JSON_UTF8, b"x" * 102)

    def post_blob(self, digest: str, body: bytes) -> Reply:
        if not _is_digest(digest):
            return _recorded("blob-post-bad-digest")
        if digest in self.blobs:
            return Reply(200, "", b"")
        found = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if found != digest:
            text = f'digest mismatch, expected "{digest}", got "{found}"'
            return Reply(400, JSON_UTF8, dumps({"error": text}))
        self.blobs[digest] = body
        return Reply(201, "", b"")

    # -- models

    def manage(self, path: str, asked: dict[str, Any]) -> Reply | Lines:
        match path:
            case "/api/copy":
                return self._copy(asked)
            case "/api/pull":
                answer = self._pull(str(asked.get("model") or asked.get("name") or ""))
            case "/api/push":
                answer = self._push(str(asked.get("model") or asked.get("name") or ""))
            case _:
                answer = self._create(asked)
        if isinstance(answer, Reply) or asked.get("stream") is not False:
            return answer
        return self._folded(answer)

    def delete(self, body: bytes) -> Reply:
        if not body:
            return _recorded("delete-empty")
        asked = orjson.loads(body)
        name = str(asked.get("model") or asked.get("name") or "")
        model = self._find(name)
        if model is None:
            return Reply(404, JSON_UTF8, dumps({"error": f"model '{name}' not found"}))
        self._models.remove(model)
        return Reply(200, "", b"")

    def finish(self, lines: Lines) -> None:
        if lines.made is not None and self._find(lines.made.name) is None:
            self._models.append(lines.made)

    def _copy(self, asked: dict[str, Any]) -> Reply:
        source = self._find(str(asked.get("source") or ""))
        if source is None:
            return Reply(404, JSON_UTF8, dumps({"error": f'model "{asked.get("source")}" not found'}))
        self._models.append(_another(source, str(asked.get("destination"))))
        return Reply(200, "", b"")

    def _pull(self, name: str) -> Lines:
        if not name.startswith(REGISTRY):
            url = f"https://registry.ollama.ai/v2/library/{name}/manifests/latest"
            error = f'pull model manifest: Get "{url}": {_NO_SUCH_HOST}'
            return _lines({"status": "pulling manifest"}, {"error": error})
        match name.removeprefix(f"{REGISTRY}library/").partition(":")[0]:
            case "tiny":
                known = self._find(name) is not None
                recorded = recording("ollama/pull-again" if known else "ollama/pull")
                return Lines(tuple(recorded.body.splitlines(keepends=True)), FakeModel(f"{name}:latest"))
            case "bad":
                return Lines(tuple(recording("ollama/pull-digest-mismatch").body.splitlines(keepends=True)))
        return Lines(tuple(recording("ollama/pull-not-found").body.splitlines(keepends=True)))

    def _push(self, name: str) -> Lines:
        model = self._find(name)
        start = {"status": "retrieving manifest"}
        if model is None:
            tag = name if ":" in name else f"{name}/latest"
            path = f"{_MODELS_DIR}/manifests/registry.ollama.ai/library/{tag.replace(':', '/')}"
            error = f"open {path}: no such file or directory"
            return _lines(start, {"status": "couldn't retrieve manifest"}, {"error": error})
        if name.startswith(REGISTRY):
            return Lines(tuple(recording("ollama/push-insecure").body.splitlines(keepends=True)))
        url = f"https://registry.ollama.ai/v2/library/{name.partition(':')[0]}/blobs/sha256:{model.weights}"
        return _lines(start, {"error": f'Head "{url}": {_NO_SUCH_HOST}'})

    def _create(self, asked: dict[str, Any]) -> Reply | Lines:
        name = str(asked.get("model") or "")
        if asked.get("files"):
            return self._create_from_files(name, asked["files"])
        if not asked.get("from"):
            return _recorded("create-nothing", "application/json")
        source = self._find(str(asked["from"]))
        if source is None:
            return self._pull(str(asked["from"]))
        layers = [{"status": f"using existing layer sha256:{source.weights}"}]
        steps = [*layers, {"status": "writing manifest"}, {"status": "success"}]
        return _lines(*steps)._replace(made=_another(source, name))

    def _create_from_files(self, name: str, files: dict[str, str]) -> Lines:
        for digest in files.values():
            if digest not in self.blobs:
                path = f"{_MODELS_DIR}/blobs/{digest.replace(':', '-')}"
                error = f"open {path}: no such file or directory"
                return _lines({"status": "parsing GGUF"}, {"error": error})
        lines = tuple(recording("ollama/create-files").body.splitlines(keepends=True))
        weights = next(iter(files.values())).removeprefix("sha256:")
        return Lines(lines, FakeModel(name, weights=weights))

    def _folded(self, answer: Lines) -> Reply:
        last = orjson.loads(answer.lines[-1])
        if "error" not in last:
            self.finish(answer)
        return Reply(500 if "error" in last else 200, "application/json", dumps(last))

    def _find(self, name: str) -> FakeModel | None:
        wanted = _canonical(name)
        return next((model for model in self._models if _canonical(model.name) == wanted), None)


def _canonical(name: str) -> str:
    short = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"


def _another(source: FakeModel, name: str) -> FakeModel:
    """The same weights under another name."""
    return FakeModel(
        name if ":" in name.rpartition("/")[2] else f"{name}:latest",
        source.capabilities,
        weights=source.weights,
    )


def _is_digest(text: str) -> bool:
    digest = text.removeprefix("sha256:")
    return text.startswith(("sha256:", "sha256-")) and len(digest.removeprefix("sha256-")) == 64


def _lines(*values: dict[str, Any]) -> Lines:
    return Lines(tuple(dumps(value, newline=True) for value in values))


def _recorded(name: str, content_type: str = JSON_UTF8) -> Reply:
    found = recording(f"ollama/{name}")
    return Reply(found.status, content_type, found.body)
