"""An HTTP proxy before SGLang that retries failed or corrupted requests on another worker.

    servers        the servers that flags or a file name
    settings       the command's flags, checked
    command        the command: parses the flags and runs the server
    routes         the paths that are proxied, and the format of their streams
    request        the client's request, and the facts its JSON body states
    workers        which servers are asked next, and which are avoided or down
    retries        what limits repeated requests
    opinions       a second opinion on an anomaly
    budget         how many bytes all requests together may keep in memory
    rendezvous     the fields that a prefill/decode pair needs in a request's body
    failure        why an attempt failed, and the error that the client gets
    sse            server-sent events, cut out of the chunks in which they arrive
    verdict        what an event or a body says about its generation
    stream         one worker's stream: held back, passed on, or failed
    names          one name for an answer that several workers wrote
    plain          how to go on with one on workers without the plugin
    trail          a stream that another worker can go on with
    headers        which HTTP headers are passed on
    reply          the client's answer, as far as it has been sent
    refusal        answers of the proxy's own
    telemetry      what is counted and logged
    worker_client  HTTP to one server
    patience       how long the next event of an answer is waited for
    relay          one worker's answer, passed on to the client
    pair           one attempt on both halves of a pair
    attempt        one attempt on one worker or pair
    withdrawal     tells workers that a request they ended was sound
    dispatch       one request: attempts in turn
    intake         a client's request, read within its limits
    health         probes of all workers, and the proxy's own /health
    discovery      the list of workers, read and looked up again
    listener       sockets, limits of open files, the clients' HTTP protocol
    proxy          the ASGI application

The modules down to `trail` do no I/O, except `command` and the reading of files. The plugin
imports none of them.
"""
