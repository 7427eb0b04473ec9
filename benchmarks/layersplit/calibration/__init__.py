"""A published gain, reproduced as a fit: which mechanism could have made it, and what tells apart.

    python -m benchmarks.layersplit.calibration      (results/calibration.json and .md; minutes)

    published  what others printed, and where
    workload   sessions of a trace, scaled to a context and kept up
    gain       goodput of one deployment over another, once all is under way
    mechanisms what may be fitted, and the search
    ablation   which part of a pool makes the gain
    rounds     #29930's conversation, played
    warm       pegaflow's ratio, beside that of prefill's compute
    report     all of it as tables

Fitting is no validation: two published numbers, one or two fitted ones.
"""
