"""`python -m herd_node`."""

from herd_node.cli import main

raise SystemExit(main())
