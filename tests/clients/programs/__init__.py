"""One small program for each Python client: it does as it is told, with that client and nothing else.

A program is another process, as a user's is: what the client imports, keeps open or warns of stays there, and
its environment is chosen by the test.
"""
