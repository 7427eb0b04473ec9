"""A trace of requests, replayed through a model of a prefill: no split, upstream's, ours.

    records    one request, as every reader gives it
    readers    lines of a file to records; mooncake, aiperf, lmcache: one format each
    cache      the LRU over prefix blocks
    deployment what of a pool the replay needs: tokens, scratch, broadcast, loads
    cost       seconds of one forward pass
    feed       when each request arrives
    engine     the replay
    simulate   three pools over one trace, as JSON
    labels     what each figure is, what is assumed, what is left out
    report     the JSON as text; picture: as SVG; progress: on the way

The capacities, bytes and exposed times are the planner's. No server imports it.
"""
