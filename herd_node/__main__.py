"""`python -m herd_node`: how the router starts the agent beside it."""

from herd_node.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
