"""An HTTP proxy before SGLang that retries failed or corrupted requests on another worker.

    settings       the command's flags, checked
    command        the command: parses the flags and runs the server
    routes         the paths that are proxied, and the format of their streams
    workers        which worker is asked next, and which are avoided or down
    budget         how many bytes all requests together may keep in memory
    request        the client's request, and the facts its JSON body states
    rendezvous     the fields that a prefill/decode pair needs in a request's body
    failure        why an attempt failed, and the error that the client gets
    sse            server-sent events, cut out of the chunks in which they arrive
    verdict        what an event or a body says about its generation
    stream         one worker's stream: held back, passed on, or failed
    headers        which HTTP headers are passed on
    reply          the client's answer, as far as it has been sent
    refusal        answers of the proxy's own
    telemetry      what is counted and logged
    worker_client  HTTP to one server
    relay          one worker's answer, passed on to the client
    pair           one attempt on both halves of a pair
    attempt        one attempt on one worker or pair
    dispatch       one request: attempts in turn
    intake         a client's request, read within its limits
    health         probes of workers that are down, and the proxy's own /health
    proxy          the ASGI application

The modules down to `stream` do no I/O, except `command`. The plugin imports none of them.
"""
