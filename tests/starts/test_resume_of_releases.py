"""Resume on the real classes of every stock release, in a process of each; no server is started.

The probe that guards a server's start passes, and names what is missing when a part of it is out
of force. Beyond the probe: a grammar, log-probabilities, both halves of a pair, stop strings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child
from tests.contract import wheels
from tests.releases import NEW

SCRIPT = """
import json
from types import SimpleNamespace
from unittest import mock
import sglang
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.resume import FIX, penalties, probe, requests
from sglang_scaling_fixes.resume.probe import GIVEN, PROMPT, queue, request

def verdict():
    try:
        probe.run()
    except AttachError as error:
        return str(error)
    return "armed"

FIX.arm(Config())
controls = {"nothing": verdict()}
for name, owner, attribute, broken in (
    ("take", requests, "take_up", lambda *a: True),
    ("mark", requests, "_take", lambda req: None),
    ("ends", requests, "_refuse", lambda *a: None),
    ("counts", penalties, "restore", lambda *a: None),
    ("tells", requests, "_tell", lambda *a: None),
):
    with mock.patch.object(owner, attribute, broken):
        controls[name] = verdict()

class Grammar(BaseGrammarObject):
    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.seen = allowed, []
    def accept_token(self, token):
        if token not in self.allowed:
            raise ValueError(token)
        self.seen.append(token)
        self.current_token = token

class Words:
    eos_token_id, additional_stop_token_ids = 1, None
    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids)

def made(mode="null", grammar=None, sent=None, logprobs=False, **sampling):
    req = request(GIVEN, **sampling)
    req.tokenizer, req.grammar = Words(), grammar
    if logprobs:
        req.return_logprob, req.logprob_start_len = True, len(PROMPT)
    return req, queue(req, mode, sent)

grammars = {}
for mode in ("null", "prefill", "decode"):
    grammar = Grammar(GIVEN)
    made(mode, grammar)
    grammars[mode] = [grammar.seen, grammar.current_token]

def refusal(**options):
    sent = []
    req, held = made(sent=sent, **options)
    reason = sent[0].finished_reason if held and sent == [req] else None
    return None if reason is None else [reason.status_code, reason.message, list(req.output_ids)]

def stops(*texts):
    with mock.patch.object(requests, "KEY", requests.KEY):
        req = request(GIVEN)
        req.tokenizer = Words()
        req.sampling_params.stop_strs = list(texts)
        req.sampling_params.stop_str_max_len = 3
        sent = []
        queue(req, sent=sent)
    return sent[0].finished_reason.message if sent else None

logged = {}
for mode in ("null", "prefill", "decode"):
    req, _ = made(mode, logprobs=True)
    kept = getattr(req, "logprob", req)
    values = kept.output_token_logprobs_val
    logged[mode] = [
        req.logprob_start_len, 0 if values is None else len(values),
        req.send_output_token_logprobs_offset,
    ]

# A pair's decode: prefill's token comes, then the KV; the prompt is the prompt again.
pair, _ = made("decode")
pair.output_ids.append(24)
batch = SimpleNamespace(reqs=[pair])
requests.arrived(lambda batch: None, batch)
requests.arrived(lambda batch: None, batch)

# The beginning of a stop string is not shown: a stream would not have.
withheld, _ = made()
withheld.stream = True
withheld.sampling_params.stop_strs, withheld.sampling_params.stop_str_max_len = ["w23 w99"], 2
withheld.output_ids.append(24)
parts = []
requests.stream(
    lambda _, reqs, *a: parts.extend(list(r.output_ids) for r in reqs), None, [withheld], False
)

plain = request()
queue(plain)
print("found:" + json.dumps({
    "file": sglang.__file__,
    "controls": controls,
    "grammars": grammars,
    "rejected": refusal(grammar=Grammar(GIVEN[:2])),
    "length": refusal(max_new_tokens=len(GIVEN)),
    "stop": stops("w22"),
    "across": stops("w23 w24"),
    "logged": logged,
    "pair": [list(pair.origin_input_ids), list(pair.output_ids)],
    "parts": parts,
    "plain": [list(plain.output_ids), requests.past(plain) is None],
}))
"""
PROMPT, GIVEN = [11, 12, 13, 14, 15], [21, 22, 21, 23]


@pytest.mark.parametrize("release", wheels.ARMED)
def test_a_resumed_request_is_a_retracted_one(
    old: Environment, new: Environment, release: str
) -> None:
    """One process says it all: an import of SGLang takes a core for ten seconds or more."""
    environment: Environment = new if release == NEW else old
    source: Path = wheels.source(release)
    env = cpu_env(environment.env)
    env["PYTHONPATH"] = f"{source}:{env['PYTHONPATH']}"
    found = child.said(environment.python, SCRIPT, env=env, mark="found:")
    assert found["file"].startswith(str(source))

    controls = found["controls"]
    assert controls.pop("nothing") == "armed"
    assert "output_ids of a resumed request" in controls["take"]
    assert "the tokens stay in custom_params" in controls["mark"]
    assert "max_new_tokens ended is taken up again" in controls["ends"]
    assert "not as stock counts it" in controls["counts"]
    assert "a stream goes on with" in controls["tells"]

    # Stock on decode takes a grammar with a current token for one that knows prefill's token.
    assert found["grammars"] == {
        "null": [GIVEN, GIVEN[-1]],
        "prefill": [GIVEN, GIVEN[-1]],
        "decode": [GIVEN, None],
    }
    status, message, output = found["rejected"]
    assert (status, output) == (400, []) and "output_ids[3] 23 is not what" in message
    status, message, output = found["length"]
    assert (status, output) == (400, []) and "4 tokens were given" in message
    assert "'w22'" in found["stop"] and found["across"] is None
    assert found["logged"] == {"null": [9, 4, 4], "prefill": [9, 0, 0], "decode": [9, 4, 4]}
    assert found["pair"] == [PROMPT, [*GIVEN, 24]]
    assert found["parts"] == [GIVEN[:3], [*GIVEN, 24]]
    assert found["plain"] == [[], True]
