"""HTTP as bytes in and out, for both programs: the front door (`exchange`, `asgi`) and the way out (`pool`).

    client ──▶ Exchange (bound to uvicorn by asgi) ──▶ a handler of herd or herd_node ──▶ Pool ──▶ upstream

Knows nothing of models, nodes or routing, reads no JSON, decides no retry but the keep-alive race
(docs/behaviour.md R-6). May import `herd_node.runtime` and `herd_node.protocol`, nothing else of ours.
"""
