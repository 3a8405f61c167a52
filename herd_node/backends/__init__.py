"""The servers that this node wraps: what each of them is, what it has, and how it is asked.

`base` says what all look like, `detect` finds out which one listens at a URL, `embedded` is the one that the
agent starts itself. Nothing here talks to a router or translates a dialect.
"""
