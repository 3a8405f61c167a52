"""Base64 images of an Ollama message → parts of an OpenAI message. Pure: sniffed by their first bytes.

Audio travels in the same list, as it does in Ollama.
"""

from __future__ import annotations

import base64
import binascii
import re

from herd_node.translate.base import Refusal
from herd_node.translate.webp import png_of

_OUTSIDE_ALPHABET = re.compile(r"[^A-Za-z0-9+/=\r\n]")


def media_part(image: str) -> tuple[str, dict[str, object]]:
    """The capability that it needs, and the part. Raises Refusal: not base64, or of a kind not known here."""
    packed = image.replace("\r", "").replace("\n", "")
    raw = _decoded(image, packed)
    sound = _sound_format(raw)
    if sound is not None:
        return "audio", {"type": "input_audio", "input_audio": {"data": packed, "format": sound}}
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        packed, media_type = base64.b64encode(png_of(raw)).decode(), "image/png"
    else:
        media_type = _media_type(raw)
    uri = f"data:{media_type};base64,{packed}"
    return "vision", {"type": "image_url", "image_url": {"url": uri}}


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
    raise Refusal(400, "only PNG, JPEG and WebP images, WAV and MP3 sound are supported on this node")


def _sound_format(raw: bytes) -> str | None:
    if raw[:4] == b"RIFF" and raw[8:12] == b"WAVE":
        return "wav"
    if raw[:3] == b"ID3" or raw[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"):
        return "mp3"
    return None
