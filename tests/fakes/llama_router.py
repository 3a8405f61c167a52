"""A llama-server in router mode as it was recorded: its list, and loads and unloads that end later.

Only what the agent asks of it; the shapes and refusals are those of the recordings. `await` `serving()` of it
with `tests.backends.replaying`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import orjson

from tests.fakes.recordings import recording

LOADED = "llamacpp/router-models-one-loaded"


class FakeLlamaRouter:
    """`looks` says how often its list must be asked until a load or an unload is done."""

    def __init__(self, folder: Path | None = None, *, looks: int = 2) -> None:
        listed = orjson.loads(recording("llamacpp/router-models-unloaded").body)["data"]
        self._meta = orjson.loads(recording(LOADED).body)["data"][0]["meta"]
        self._template = listed[0]
        self._looks = looks
        self._pending: dict[str, int] = {}
        self.folder = folder
        self.asked: list[str] = []
        self.broken = {"broken"}
        self.entries: dict[str, dict[str, Any]] = {}
        if folder is None:
            self.entries = {entry["id"]: entry for entry in listed}
        else:
            self._scan()

    def status(self, name: str) -> str:
        return str(self.entries[name]["status"]["value"])

    def answer(self, method: str, target: str, body: object) -> tuple[int, bytes]:
        path, _, query = target.partition("?")
        self.asked.append(f"{method} {target}")
        fields: dict[str, Any] = body if isinstance(body, dict) else {}
        match path:
            case "/props" if not query:
                return self._recorded("llamacpp/router-props-nomodel")
            case "/props":
                return self._props(query)
            case "/models":
                return self._list(query)
            case "/models/load":
                return self._load(str(fields.get("model")))
            case "/models/unload":
                return self._unload(str(fields.get("model")))
            case "/v1/embeddings":
                return self._recorded("llamacpp/embeddings-not-enabled")
        return self._recorded("llamacpp/err-404")

    def _recorded(self, name: str) -> tuple[int, bytes]:
        found = recording(name)
        return found.status, found.body

    def _list(self, query: str) -> tuple[int, bytes]:
        if query == "reload=1" and self.folder is not None:
            self._scan()
        self._go_on()
        return 200, orjson.dumps({"data": list(self.entries.values()), "object": "list"})

    def _props(self, query: str) -> tuple[int, bytes]:
        assert query.endswith("&autoload=false"), "a poll must not load anything"
        name = query.removeprefix("model=").partition("&")[0]
        if self.status(name) != "loaded":
            return self._recorded("llamacpp/router-unload-again")
        return self._recorded("llamacpp/router-props-loaded")

    def _load(self, name: str) -> tuple[int, bytes]:
        if name not in self.entries:
            return self._recorded("llamacpp/router-load-unknown")
        if self.status(name) != "unloaded":
            return self._recorded("llamacpp/router-load-again")
        self.entries[name]["status"] = {"value": "loading", "args": self.entries[name]["status"]["args"]}
        self._pending[name] = self._looks
        return self._recorded("llamacpp/router-load")

    def _unload(self, name: str) -> tuple[int, bytes]:
        if name not in self.entries:
            return self._recorded("llamacpp/router-unload-unknown")
        if self.status(name) == "unloaded":
            return self._recorded("llamacpp/router-unload-again")
        self._pending[name] = self._looks
        return self._recorded("llamacpp/router-unload")

    def _go_on(self) -> None:
        for name, left in list(self._pending.items()):
            self._pending[name] = left - 1
            if left > 1:
                continue
            del self._pending[name]
            entry = self.entries[name]
            loading = entry["status"]["value"] == "loading"
            entry["status"]["value"] = "loaded" if loading and name not in self.broken else "unloaded"
            if loading and name in self.broken:
                entry["status"] |= {"failed": True, "exit_code": 1}
            if entry["status"]["value"] == "loaded":
                entry["meta"] = dict(self._meta)
            else:
                entry.pop("meta", None)

    def _scan(self) -> None:
        assert self.folder is not None
        for gone in [name for name in self.entries if not (self.folder / f"{name}.gguf").exists()]:
            del self.entries[gone]
        for file in sorted(self.folder.glob("*.gguf")):
            self.entries.setdefault(file.stem, self._entry(file))

    def _entry(self, file: Path) -> dict[str, Any]:
        entry = copy.deepcopy(self._template)
        entry["id"] = file.stem
        args = entry["status"]["args"]
        args[args.index("--model") + 1] = str(file)
        args[args.index("--alias") + 1] = file.stem
        return entry
