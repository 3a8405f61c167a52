"""The exception tree: each leaf is a decision somebody makes.

HerdError
├── SettingsError            a flag, variable or file is wrong         -> exit 2
├── StartError               port taken, folder locked                 -> exit 1
├── NotReachable             a client command found no router          -> exit 1
└── ApiError                 an answer to a caller, with its status    -> body in the caller's dialect
    ├── ClientError          the caller's fault
    │   ├── BadRequest           400
    │   ├── Forbidden            403
    │   ├── ModelNotFound        404
    │   ├── NotFound             404
    │   ├── MethodNotAllowed     405
    │   ├── BodyTooLarge         413
    │   ├── UnsupportedEncoding  415
    │   └── NotOffered           501
    ├── FleetError           the request was fine, the fleet was not
    │   ├── UpstreamFailed       502
    │   ├── Saturated            503 + Retry-After
    │   └── UpstreamTimeout      504
    └── BackendRefused       the backend's own 4xx, passed on
"""

from __future__ import annotations

from typing import NamedTuple


class Said(NamedTuple):
    """A backend's own answer that is an error."""

    status: int
    body: bytes
    content_type: bytes


class HerdError(Exception):
    """Root of every error that this program raises on purpose. `str()` is a sentence for a person."""


class SettingsError(HerdError):
    """A flag, variable or file is wrong."""


class StartError(HerdError):
    """The program cannot start: port taken, data folder locked."""


class NotReachable(HerdError):
    """No router answered a client command."""


class ApiError(HerdError):
    """An answer to a caller. `status` is the HTTP status; `kind` is a word that dialects map to their own."""

    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ClientError(ApiError):
    """The caller's fault."""

    status = 400
    kind = "bad_request"


class BadRequest(ClientError):
    """Malformed, or it can never be served."""


class Forbidden(ClientError):
    """Not from there."""

    status = 403
    kind = "forbidden"


class ModelNotFound(ClientError):
    """No node lists the model."""

    status = 404
    kind = "model_not_found"

    def __init__(self, message: str, *, model: str | None = None) -> None:
        super().__init__(message)
        self.model = model


class NotFound(ClientError):
    """No such path, or no such thing at it."""

    status = 404
    kind = "not_found"


class MethodNotAllowed(ClientError):
    """The path exists, the method does not."""

    status = 405
    kind = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class UnsupportedEncoding(ClientError):
    """A Content-Encoding that is not unpacked here."""

    status = 415
    kind = "bad_request"


class BodyTooLarge(ClientError):
    """More bytes than the limit."""

    status = 413
    kind = "too_large"


class NotOffered(ClientError):
    """The endpoint exists, but no backend of the fleet offers it for this model."""

    status = 501
    kind = "not_offered"


class FleetError(ApiError):
    """The request was fine, the fleet was not."""


class Saturated(FleetError):
    """Hold or wait expired, queue full, draining."""

    status = 503
    kind = "saturated"


class UpstreamFailed(FleetError):
    """Every attempt failed, or the answer broke off."""

    status = 502
    kind = "upstream_failed"


class UpstreamTimeout(FleetError):
    """A deadline passed."""

    status = 504
    kind = "timeout"


class BackendRefused(ApiError):
    """The backend's own 4xx, passed on with its status and text."""

    kind = "backend_refused"

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, said: Said | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status
        self.said = said
