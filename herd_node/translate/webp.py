"""WebP → PNG, which llama-server can read: by pillow, if the extra `webp` is installed. No other I/O."""

from __future__ import annotations

import io

from herd_node.translate.base import Refusal

MAX_PIXELS = 64 * 1024 * 1024
"""A small file can be a huge picture; this is 256 MiB of memory."""

_MISSING = (
    "WebP images need the extra \"webp\" on this node (pip install 'herd-fleet[webp]'); or send PNG or JPEG"
)


def png_of(webp: bytes) -> bytes:
    """Raises Refusal: pillow is not there, or that is no picture."""
    try:
        from PIL import Image
    except ImportError:
        raise Refusal(400, _MISSING) from None
    try:
        with Image.open(io.BytesIO(webp), formats=["WEBP"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Refusal(400, f"the WebP image has more than {MAX_PIXELS} pixels")
            out = io.BytesIO()
            picture.save(out, "PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise Refusal(400, "the WebP image cannot be read") from None
    return out.getvalue()
