"""Programs and values that stand in for the outside world. They are real programs over real sockets."""
