"""argv → settings → run. Replaced soon."""


def main() -> int:
    return 0
