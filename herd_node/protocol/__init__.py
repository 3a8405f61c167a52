"""What both programs agree on: heartbeat, signing, names, record framing, the shared part of the route table.

Standard library only and sans-I/O: nothing here opens a socket, reads a clock, a file or a random number.
Normative text: docs/protocol.md.
"""
