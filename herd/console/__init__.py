"""The client commands of `herd`: each asks a running router, or the data folder, and prints.

Every `run_*(args) -> int` takes the parsed command line (host, port, data_dir, json and its own options) and
returns the exit code: 0 done, 1 failed or not reachable. Results go to standard output, everything else to
standard error; `--json` prints the objects of the contract and nothing beside them. Nothing here is imported
by the running router.
"""
