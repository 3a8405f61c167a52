"""Which node serves a request, and why: filter, score, pick, plan (docs/scheduling.md).

Everything here is a pure function over frozen views (`herd.fleet.snapshot`): time comes in as `now_s`,
nothing does I/O, nothing is remembered but what the caller hands back in. The way of a decision:

    eligibility   may this node serve it at all, and if not: why, and is there hope
    context       how much context and memory it needs there
    estimate      what it would cost there, in seconds
    signals       the same seconds as seven numbers that a person can read
    score         candidates of one request, ranked; rows are kept while nothing changed
    decide        the one step for one request now; `steps` are the values it answers with
    plan          the same for everybody who waits, in order, with claims and drains
"""
