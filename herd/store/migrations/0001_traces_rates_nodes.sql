-- The first schema. Times are unix seconds (REAL), durations milliseconds, JSON columns are TEXT.
-- 0x68657264 is "herd" in ASCII: a file with tables and without this mark belongs to another program.
PRAGMA application_id = 0x68657264;

-- One row an attempt. Columns are a contract (docs/traces.md): people query this table with the sqlite3 program.
CREATE TABLE request_traces (
    request_id TEXT NOT NULL,
    client_request_id TEXT,
    attempt INTEGER NOT NULL,
    model TEXT NOT NULL,
    original_model TEXT NOT NULL,
    node_id TEXT,
    score REAL,
    scores_breakdown TEXT,
    candidates TEXT NOT NULL DEFAULT '[]',
    excluded_nodes TEXT NOT NULL DEFAULT '{}',
    status TEXT NOT NULL CHECK (
        status IN ('started', 'completed', 'retried', 'failed', 'client_gone', 'rejected', 'interrupted', 'no_output')
    ),
    latency_ms REAL,
    time_to_first_token_ms REAL,
    queue_ms REAL,
    prompt_tokens INTEGER,
    cached_tokens INTEGER,
    completion_tokens INTEGER,
    retry_count INTEGER NOT NULL DEFAULT 0,
    fallback_used INTEGER NOT NULL DEFAULT 0,
    client_ip TEXT,
    original_format TEXT NOT NULL,
    kind TEXT NOT NULL,
    principal TEXT,
    user TEXT,
    error_message TEXT,
    finish_reason TEXT,
    estimated_tokens REAL,
    tags TEXT NOT NULL DEFAULT '[]',
    router_id TEXT NOT NULL,
    agent_version TEXT,
    timestamp REAL NOT NULL,
    PRIMARY KEY (request_id, attempt)
);
CREATE INDEX request_traces_by_time ON request_traces (timestamp);
CREATE INDEX request_traces_open ON request_traces (timestamp) WHERE status = 'started';

-- What was measured (docs/scheduling.md): one row a quantity, so a new one needs no new column.
-- node_id is '' where the quantity belongs to the model wherever it runs.
CREATE TABLE learned_rates (
    node_id TEXT NOT NULL,
    model TEXT NOT NULL,
    quantity TEXT NOT NULL,
    value REAL NOT NULL,
    updated REAL NOT NULL,
    PRIMARY KEY (node_id, model, quantity)
);

-- What each node listed when it was last heard, so that a restart of the router forgets nothing.
CREATE TABLE nodes (
    node_id TEXT PRIMARY KEY,
    models TEXT NOT NULL,
    updated REAL NOT NULL
);
