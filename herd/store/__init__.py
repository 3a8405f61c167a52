"""Every line of SQL of the router: one SQLite file, one writer, read-only connections for pages.

`database` opens the file and owns the connections; the other modules are functions that take a
`sqlite3.Connection` and plain values, so each can be called in the writer's transaction, on a page's
read-only connection, or in a test. Nothing here knows of requests in flight; SQL stands nowhere else.
"""
