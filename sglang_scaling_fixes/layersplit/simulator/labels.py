"""What each figure of a replay is, by which rule, and what the model leaves out.

Every figure is modelled: a replay runs no model and measures nothing. Only the trace is as given.
"""

from __future__ import annotations

FORMULAS = {
    "trace.requests": "requests of the file",
    "trace.sessions": "sessions of the file; a format without them has one for each request",
    "trace.prompt_tokens": "sum over the requests",
    "trace.mean_prompt_tokens": "trace.prompt_tokens / trace.requests",
    "trace.longest_prompt_tokens": "of one request",
    "trace.reuse": (
        "share of the prompt tokens that an earlier request of the file had in the same prefix: "
        "the hit rate of a pool without end"
    ),
    "pools.capacity_tokens": "T: as `layersplit plan` has it",
    "pools.contexts_held": "floor(T / trace.mean_prompt_tokens)",
    "pools.host_tokens": "(--host-mem) / (layers that the fullest rank keeps * b), down to pages",
    "pools.requests.answered": "first token made",
    "pools.requests.late": "answered, after more than --ttft-limit",
    "pools.requests.refused": (
        "longer than T or than the model reads, and all that would have followed in their session"
    ),
    "pools.hit_rate": "prompt tokens found in the pool / prompt tokens, of answered requests",
    "pools.loaded_rate": "prompt tokens that came from the host / prompt tokens, of the same",
    "pools.goodput_tokens_s": (
        "prompt tokens of requests answered in time / pools.span_s; modelled, and no more than the "
        "trace asks for"
    ),
    "pools.busy_tokens_s": (
        "prompt tokens of answered requests / busy seconds: the goodput of a trace that leaves no "
        "pause, with the same hits"
    ),
    "pools.ttft_s": "end of the pass that computes the prompt's last token - arrival",
    "pools.gpu_s.compute": "sum over passes: FLOPs of all layers / (P * FLOP/s)",
    "pools.gpu_s.exposed_broadcast": (
        "sum over passes: as `layersplit plan` has it, with the pass's prefixes together"
    ),
    "pools.gpu_s.exposed_load": (
        "sum over passes: max(0, loaded tokens * b * layers that the fullest rank keeps / load "
        "speed - compute)"
    ),
    "pools.gpu_s.idle": "span - the three others",
    "pools.passes": "forward passes, each at most C new tokens of any number of requests",
    "pools.most_held": "most requests that held KV at once, from admission until decode has it",
    "pools.span_s": "end of the last pass - arrival of the first request",
    "gain.over_unsplit": "of ours over no split: ratio of the figure of that name",
    "gain.over_upstream": "of ours over upstream's: ratio of the figure of that name",
}
"""By the figure's path in the JSON; a path stands for all below it, too."""

SYMBOLS = {
    "T": "tokens that a pool holds",
    "P": "ranks (--cp)",
    "b": "bytes of one token's KV and index-K in one layer",
    "C": "new tokens of a forward pass (--chunked-prefill-size)",
}

RULES = (
    "requests are served in the order of their arrival; the first that does not fit waits, and all "
    "behind it",
    "a request holds the pages of its whole prompt until decode has them; a shared prefix counts "
    "once, so that floor(T / L) requests of L unshared tokens run at once",
    "what nobody holds stays in an LRU of prefix blocks; of one use the end of a prefix goes first",
    "with --host-mem every block is in the host's LRU, too; what the pool lost is loaded from "
    "there beside the compute",
    "KV goes to decode pass by pass, one request after the other",
    "the next turn of a session comes its delay after decode has made the answer",
    "ours closes a batch whose prefixes would not fit the scratch",
)

LEFT_OUT = (
    "decode: it takes every request at once, and needs the same time for each token",
    "kernels below the assumed FLOP/s, CP's and the experts' own communication, scheduling",
    "upstream's copy of each owned layer into its scratch (in upstream's favour)",
    "two requests that compute the same new prefix side by side: it is held once (in nobody's "
    "favour)",
    "time of a write-back to the host",
    "requests that clients give up",
)
