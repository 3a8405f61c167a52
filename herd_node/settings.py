"""Every setting of the agent, and the only reader of the environment.

Precedence: flag > FLEET_NODE_* variable > default. The rest of the agent receives the frozen `Settings`;
nobody else reads a variable. Documented in docs/settings.md, which a test compares with this file.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from herd_node.protocol.names import is_node_id, legal_node_id
from herd_node.runtime.paths import default_root

PREFIX = "FLEET_NODE_"
ROUTER_PORT = 11435
HUB = "https://huggingface.co"


class SettingsError(Exception):
    """A flag or variable is wrong. `str()` is a sentence that names it."""


def http_url(text: str, default_port: int) -> str:
    """`HOST`, `HOST:PORT` or `http://HOST:PORT` as `http://HOST:PORT`. Raises ValueError with a sentence."""
    parts = urlsplit(text if "//" in text else f"http://{text}")
    try:
        port = parts.port or default_port
    except ValueError:
        port = 0
    whole = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username)
    if parts.scheme != "http" or not parts.hostname or not whole or port == 0:
        raise ValueError("must look like http://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"http://{host}:{port}"


def _commas(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _addresses(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(ip_address(value)) for value in values)


def _backends(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(http_url(value, 80) for value in values))


def _node_id(value: str) -> str:
    if value and not is_node_id(value):
        raise ValueError("must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return value


def _router_url(value: str) -> str:
    return http_url(value, ROUTER_PORT) if value else ""


Commas = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_commas)]


class Settings(BaseSettings):
    """The agent's settings; frozen once read. Each field's description is its line in docs/settings.md."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    router_url: Annotated[str, AfterValidator(_router_url)] = Field(
        "", description="The router's address; empty means a known one, else mDNS."
    )
    id: Annotated[str, AfterValidator(_node_id)] = Field(
        "", description="The node's id (flag --node-id); empty means the host name made legal."
    )
    backend: Annotated[Commas, AfterValidator(_backends)] = Field(
        (), description="Local servers (comma separated); empty means 127.0.0.1:11434 and :8080."
    )
    embedded: bool = Field(False, description="Run a llama.cpp server of its own as a child process.")
    model: Path | None = Field(
        None, description="GGUF file for the embedded server; empty means the small model, fetched once."
    )
    models_dir: Path | None = Field(
        None, description="Folder that GGUF files are pulled into; empty means `models` in the data folder."
    )
    host: str = Field(
        "", description="Address the gateway listens on, `*` for all; empty: as near as the router is."
    )
    port: int = Field(11436, ge=0, le=65535, description="The gateway's port; 0 takes a free one.")
    data_dir: Path = Field(
        default_factory=default_root, description="Folder of credentials, logs and downloaded models."
    )
    heartbeat_interval: float = Field(5.0, ge=0.5, le=60, description="Seconds between two heartbeats.")
    join: str = Field("", description="Token from `herd join`; `-` reads one line from standard input.")
    slots: int | None = Field(
        None, ge=1, le=1024, description="Slots of every model, instead of the backend's."
    )
    address: Annotated[Commas, AfterValidator(_addresses)] = Field(
        (), description="Further IP addresses of this machine (comma separated), as a router may see them."
    )
    embedded_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of the embedded server; empty means half of the cores."
    )
    drain_timeout_s: float = Field(120.0, ge=0, le=86400, description="What running calls get after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` merges flags and environment, so that an error can name its source

    @property
    def node_id(self) -> str:
        return self.id or legal_node_id(socket.gethostname())


class Proxy(NamedTuple):
    """HTTPS_PROXY (or ALL_PROXY) and NO_PROXY: how this machine gets outward, for pulls alone.

    What is fetched over plain http lies on this network, so HTTP_PROXY has nothing to do.
    """

    url: str = ""
    without: tuple[str, ...] = ()

    def for_host(self, host: str) -> str | None:
        return None if not self.url or any(_is_within(host, name) for name in self.without) else self.url


class Surroundings(NamedTuple):
    """Other programs' variables: how the Ollama beside the agent is (probably) set up; the way outward."""

    num_parallel: int | None
    max_loaded: int | None
    models: Path | None
    proxy: Proxy = Proxy()
    hub: str = HUB
    """HF_ENDPOINT: where Hugging Face, or a mirror of it, is."""


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> tuple[Settings, tuple[str, ...]]:
    """Settings, and warnings of one sentence each. `flags` holds only what the command line said.

    Raises SettingsError.
    """
    env = dict(os.environ if environ is None else environ)
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    from_env = {name: env[variable] for variable, name in known.items() if env.get(variable)}
    try:
        settings = Settings(**{**from_env, **flags})
    except ValidationError as error:
        raise SettingsError(_sentence(error, flags)) from None
    warnings = tuple(
        f"{name} is not a setting of herd-node and is ignored (docs/settings.md lists them)"
        for name in sorted(env)
        if name.startswith(PREFIX) and name not in known
    )
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser()}), warnings


def surroundings(environ: Mapping[str, str] | None = None) -> Surroundings:
    """Values that Ollama itself would not understand are taken as absent."""
    env = os.environ if environ is None else environ
    models = env.get("OLLAMA_MODELS")
    return Surroundings(
        _positive(env.get("OLLAMA_NUM_PARALLEL")),
        _positive(env.get("OLLAMA_MAX_LOADED_MODELS")),
        Path(models) if models else None,
        _proxy(env),
        (env.get("HF_ENDPOINT") or HUB).rstrip("/"),
    )


def _proxy(env: Mapping[str, str]) -> Proxy:
    """Lower case counts first, as in other programs."""
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    url = next((env[name] for name in names if env.get(name)), "")
    without = (env.get("no_proxy") or env.get("NO_PROXY") or "").lower()
    names_without = tuple(name.strip() for name in without.split(",") if name.strip())
    return Proxy(url if not url or "://" in url else f"http://{url}", names_without)


def _is_within(host: str, name: str) -> bool:
    """`name` of NO_PROXY: `*`, a host, or the domain that it stands in."""
    domain = name.lstrip("*").lstrip(".")
    return name == "*" or host.lower() == domain or host.lower().endswith(f".{domain}")


def _positive(text: str | None) -> int | None:
    with contextlib.suppress(ValueError):
        return max(0, int(text or "")) or None
    return None


def _sentence(error: ValidationError, flags: Mapping[str, Any]) -> str:
    """One sentence without the value: it may be a token."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    flag = "--node-id" if name == "id" else "--" + name.replace("_", "-")
    message = first["msg"].removeprefix("Value error, ")
    return f"{flag if name in flags else PREFIX + name.upper()}: {message}"
