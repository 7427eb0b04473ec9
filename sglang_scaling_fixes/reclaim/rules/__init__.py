"""The rules of safe reclaim: plain Python that knows no SGLang, socket, thread or clock.

    types            a rank, a proof, what prefill can answer
    exposure         destinations that decode sent, and the life they have (a table)
    decode_ledger    when may a slot go back?
    successes        what is a report of success worth?
    endings          what is it worth that prefill ended a request?
    questions        which writer is asked next?
    causes           what is held, put together by what it waits for
    reasons          what does a hold wait for, in words?
    attempt          destinations that prefill received, and the life they have (a table)
    prefill_ledger   when is nothing of an attempt written any more?
    prefill_actions  what it decides
    ended_rooms      requests that ended before their destinations came
    refused_rooms    requests that decode does not take, and that have not come
    attempts         which attempts does prefill remember, and for how long?
    forgotten        what is still said of leases that are not remembered?
    kept_back        which destinations wait for their room, and which is due?
    prefill_audit    does prefill's ledger agree with itself, and how large is it?
    coverage         was all that was exposed written?
    quarantine       how much may be held, and when is a fence worth its price?
    pace             how often may a silent rank be asked?
    stock_aborts     stock's own ABORT, believed where the operator says so

Events come in as method calls, with the time as an argument (seconds of any monotonic clock).
What to do comes out as return values. The adapters in `reclaim.decode` and `reclaim.prefill`
translate and decide nothing.
"""
