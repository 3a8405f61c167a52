"""Open files: every stream takes two descriptors, and many systems give a program 256 or 1,024 of them."""

from __future__ import annotations

import sys

#: Enough for thousands of streams; asking for more than the system allows fails as a whole.
_WANTED = (65536, 10240, 4096)


def raise_open_files() -> None:
    """Lift the soft limit towards the hard one, as far as the system lets us; never lower it."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _WANTED:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or limit <= soft:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):
            continue
        return
