"""A proxy before SGLang that asks another worker when one of them loses or spoils an answer.

    settings    the command's flags, checked
    command     the command: flags in, exit status out
    workers     which worker is asked next, and which are left alone for a while
    routes      the paths that are retried, and how each one's streams end
    request     what is read from a request's body, and what a PD pair needs added to it
    failure     why an attempt failed, and how the client is told
    sse         server-sent events cut out of whatever chunks arrive
    verdict     what an event or a body says about its generation
    stream      one worker's stream: hold back, pass on, or fail
    budget      how much all requests together may keep in memory
    attempt     one request to one worker (or pair), over HTTP
    proxy       the ASGI application: attempts in turn, limits, health, metrics

All but command, attempt and proxy do no I/O. Nothing here is imported by the plugin.
"""
