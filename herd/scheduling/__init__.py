"""Which node serves a request, and why: filter, score, pick, plan (docs/scheduling.md).

Everything here is a pure function over frozen views (`herd.fleet.snapshot`): time comes in as `now_s`,
nothing does I/O, nothing is remembered but what the caller hands back in. The way of a decision:

    eligibility   may this node serve it at all, and if not: why, and is there hope
    bounds        how far a request may go: one node alone, one kind of server, other models
    context       how much context and memory it needs there
    estimate      the formulas, each by itself
    standing      what it would cost there, in seconds: the node's half and the request's
    signals       the same seconds as seven numbers that a person can read
    rows          the node's halves, kept while nothing changed
    score         candidates of one request, ranked
    categories    what a model is for
    standins      the loaded models that may serve instead of one that is not
    decide        the one step for one request now; `steps` are the values it answers with
    plan          the same for everybody who waits, in order, with claims and drains
"""
