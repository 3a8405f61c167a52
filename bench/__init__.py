"""The bench: what a request costs in the router, beside other routers, on one machine, in the same minutes.

    __main__      argv, progress, files
    scenarios     what is sent                    goals      what the figures should be, and the verdict
    targets       what it is sent through         report     JSON and the tables of bench/README.md
    rounds        the order of measuring          decision, memory    what needs no load, or other load
    build, processes, machine                     compiler, child processes, /proc
    direct_nodes, fleet                           nodes without agents: signed beats, signed pings
    native/       load generator and synthetic backend, C

It measures and changes nothing; no part of `herd` or `herd_node` imports it.
"""
