"""The agent: one process a machine, and the floor (`protocol`, `net`, `runtime`) that both programs stand on.

It wraps the local backends (Ollama, llama-server, other OpenAI-compatible servers), makes each of them answer
both the Ollama and the OpenAI dialect, reports the machine's state every 5 s in a signed heartbeat, and
serves its router's signed calls at the gateway. It never talks to another agent.

`protocol` is stdlib-only and does no I/O; `net` knows HTTP but nothing of routing; `runtime` is the only
reader of time and the only creator of tasks.
"""
