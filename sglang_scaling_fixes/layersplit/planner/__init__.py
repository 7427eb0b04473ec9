"""What LayerSplit would hold, send and leave exposed on given hardware: arithmetic, no torch.

    flags      words of the command line to numbers; pool_flags: those of a deployment
    models     widths of a model, bytes of its rows
    capacity   tokens that a pool holds
    flops      compute of a layer
    traffic    bytes of a forward, and what of their time is exposed
    plan       all of it for given contexts, as JSON
    labels     what each figure is, and by which formula; assumptions: where each input is from
    report     the same as text; layout: how text is laid out

No server imports it.
"""
