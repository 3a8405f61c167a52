"""Every setting of the router, and the only reader of the environment and of herd.toml.

Precedence: flag > FLEET_* variable > <data-dir>/herd.toml > default. The rest of the program receives frozen
values (`scheduling.Policy`, `proxy.Deadlines`) that `app` builds from these; nobody else reads a setting.
Documented in docs/settings.md, which a test compares with this file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from herd.errors import SettingsError
from herd_node.protocol.names import is_model_name

_PREFIX = "FLEET_"
_AGENT_PREFIX = "FLEET_NODE_"


def _split_networks(value: object) -> object:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        for part in value:
            ip_network(str(part), strict=False)
        return tuple(str(part) for part in value)
    return value


def _split_aliases(value: object) -> object:
    """`pattern=model, …`, or a table."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {pattern.strip(): target.strip() for pattern, _, target in pairs}
    if isinstance(value, dict):
        for pattern, target in value.items():
            if not pattern or not isinstance(target, str) or not is_model_name(target):
                raise ValueError(f"must be PATTERN=MODEL, comma separated; '{pattern}' names no model")
    return value


Aliases = Annotated[dict[str, str], NoDecode, BeforeValidator(_split_aliases)]
Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_networks)]


class Settings(BaseSettings):
    """The router's settings; frozen once read. Each field's description is its line in docs/settings.md."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    host: str = Field("", description="Address to listen on; empty means all interfaces, IPv4 and IPv6.")
    port: int = Field(11435, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(
        default_factory=lambda: Path.home() / ".fleet-manager",
        description="Folder of database, join secret, logs and models.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    allow_net: Networks = Field(
        (), description="Networks (CIDR, comma separated) that may call beside loopback and own links."
    )
    mdns: bool = Field(True, description="Announce the router on the local network by mDNS.")
    with_node: bool = Field(False, description="Run an agent for this machine as a child process.")
    hold_timeout_s: float = Field(30, gt=0, le=3600, description="Longest hold while no node can take it.")
    wait_timeout_s: float = Field(300, gt=0, le=86400, description="Longest wait for a slot of a busy node.")
    connect_timeout_s: float = Field(2, gt=0, le=60, description="Longest connect to a node.")
    first_record_timeout_s: float = Field(
        120, gt=0, le=3600, description="Longest silence before a stream's first record, model hot."
    )
    cold_load_timeout_s: float = Field(
        300, gt=0, le=7200, description="The same while the model has to be loaded."
    )
    gap_timeout_s: float = Field(60, gt=0, le=3600, description="Longest silence between two records.")
    gap_buffered_timeout_s: float = Field(
        120, gt=0, le=3600, description="The same while tools or structured output are buffered."
    )
    total_timeout_s: float = Field(1800, gt=0, le=86400, description="Longest life of one request.")
    write_timeout_s: float = Field(
        60, gt=0, le=3600, description="A client that reads nothing for this long is dropped."
    )
    drain_timeout_s: float = Field(25, ge=0, le=3600, description="What running requests get after SIGTERM.")
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, description="Largest request body.")
    max_waiting: int = Field(1000, ge=0, description="Most requests waiting and held together.")
    model_aliases: Aliases = Field(
        {}, description="What a name stands for that no node has: `claude-*=MODEL, …`; the first fit counts."
    )
    auto_pull: Literal["off", "trusted", "on"] = Field(
        "off",
        description="Who may cause a pull by asking for a model that no node has: nobody, trusted, all.",
    )
    auto_pull_timeout_s: float = Field(3600, gt=0, le=86400, description="Longest pull of that kind.")
    auto_pull_wait_s: float = Field(
        30, gt=0, le=3600, description="How long a request that cannot be kept alive waits for it before 503."
    )
    progress: Literal["off", "reasoning"] = Field(
        "off", description="Tell streams what they wait for, as reasoning, without `X-Fleet-Progress: 1`."
    )
    max_attempts: int = Field(
        3, ge=1, le=10, description="Most attempts of one request, over its whole chain."
    )
    score_points: float = Field(
        15, gt=0, le=15, description="Points that stand for the total time of the best choice."
    )
    context_protection: Literal["strip", "warn", "passthrough"] = Field(
        "strip", description="Options that would make Ollama load a model anew: edited, told of, or left."
    )
    vram_fallback: bool = Field(
        False, description="A loaded model of the same category answers instead of a cold load."
    )
    retention_days: float = Field(30, gt=0, description="Trace rows older than this are deleted.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Flags and the file both come in through `load`, which merges them around the environment.
        return (init_settings,)


def load(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    config_file: str | Path | None = None,
) -> tuple[Settings, tuple[str, ...]]:
    """Merge the four sources; returns the settings and warnings (one sentence each).

    `flags` holds only what the command line said. Raises SettingsError with a sentence that names the source.
    """
    env = dict(os.environ if environ is None else environ)
    from_env = _from_environment(env)
    data_dir = Path(flags.get("data_dir") or from_env.get("data_dir") or Path.home() / ".fleet-manager")
    explicit = config_file or env.get("FLEET_CONFIG")
    file = Path(explicit) if explicit else data_dir / "herd.toml"
    from_file = _from_file(file.expanduser(), must_exist=bool(explicit))
    merged: dict[str, Any] = {**from_file, **from_env, **flags}
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise SettingsError(_sentence(error, flags, from_env)) from error
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser()}), _unknown_variables(env)


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name in Settings.model_fields:
        value = env.get(_PREFIX + name.upper())
        if value is not None and value != "":
            found[name] = value
    return found


def _unknown_variables(env: Mapping[str, str]) -> tuple[str, ...]:
    known = {_PREFIX + name.upper() for name in Settings.model_fields} | {"FLEET_CONFIG"}
    return tuple(
        f"{name} is not a setting of herd and is ignored (docs/settings.md lists them)"
        for name in sorted(env)
        if name.startswith(_PREFIX) and not name.startswith(_AGENT_PREFIX) and name not in known
    )


def _from_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if must_exist:
            raise SettingsError(f"{path}: there is no such file (--config names it)") from None
        return {}
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        values = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    unknown = sorted(set(values) - set(Settings.model_fields) | ({"data_dir"} & set(values)))
    if unknown:
        known = ", ".join(sorted(set(Settings.model_fields) - {"data_dir"}))
        raise SettingsError(f"{path}: unknown key {', '.join(unknown)}; known keys are {known}")
    return values


def _sentence(error: ValidationError, flags: Mapping[str, Any], env: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if name in flags:
        source = "--" + name.replace("_", "-")
    elif name in env:
        source = _PREFIX + name.upper()
    else:
        source = f"herd.toml: {name}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{source}: {message} (got {first['input']!r})"
