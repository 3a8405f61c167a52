"""Carrying out what the planner decides: waiting, sending, retrying, streaming, recording.

The only part of the router that holds a client's request and a node's answer at the same time.
"""
