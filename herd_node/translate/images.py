"""Base64 images of an Ollama message → data URIs. Pure: sniffed by their first bytes, never decoded."""

from __future__ import annotations

import base64
import binascii
import re

from herd_node.translate.base import Refusal

_OUTSIDE_ALPHABET = re.compile(r"[^A-Za-z0-9+/=\r\n]")


def data_uri(image: str) -> str:
    """`data:image/png;base64,…` of bare standard base64. Raises Refusal: not base64, or not PNG or JPEG."""
    packed = image.replace("\r", "").replace("\n", "")
    return f"data:{_media_type(_decoded(image, packed))};base64,{packed}"


def _decoded(image: str, packed: str) -> bytes:
    stranger = _OUTSIDE_ALPHABET.search(image)
    if stranger is None:
        try:
            return base64.b64decode(packed, validate=True)
        except binascii.Error:
            pass  # the padding is wrong: the text just ends too early
    at = len(image) if stranger is None else len(image[: stranger.start()].encode())
    raise Refusal(400, f"illegal base64 data at input byte {at}")


def _media_type(raw: bytes) -> str:
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if raw.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        raise Refusal(400, "WebP images are not supported yet on llama.cpp nodes; send PNG or JPEG")
    raise Refusal(400, "only PNG and JPEG images are supported on llama.cpp nodes")
