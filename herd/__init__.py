"""The router: many machines, one LLM endpoint.

Five primitives, and which way each flows:

* a *Heartbeat* comes from an agent every 5 s; `fleet.registry` folds it into *Node* and *Instance* values;
* a client's HTTP request becomes an *InferenceRequest* (`dialects` parse its head, nothing else reads it);
* `scheduling.plan` takes a request and a *FleetSnapshot* and answers with a *Step*: Attempt, Wait, Hold,
  Pull or Reject. It is pure: same values in, same step out, time comes in as `now_s`;
* `proxy.dispatch` carries a Step out: it signs, sends, commits late, streams, and requires the terminator;
* every attempt ends as one *Trace*, which `proxy.trace_writer` puts into SQLite off the hot path.

Who does I/O: `web` (HTTP in), `proxy` and `herd_node.net` (HTTP out), `store` (SQL), `discovery` (mDNS).
Who must not: `fleet`, `scheduling`, `dialects`, `request`, `trace`. import-linter holds everyone to it.
`app` builds everything once and owns every lifetime; nothing else keeps module-level state.
"""

__version__ = "0.1.0"
