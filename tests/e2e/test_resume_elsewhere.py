"""Resumed with drafts, with the overlap schedule, on an older release; in mid-thought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers import server as lab_server
from sglang_scaling_fixes.lab.servers.serve import SPEC_FLAGS
from sglang_scaling_fixes.lab.servers.server import COMMON_FLAGS

from .test_resume import (
    CHAT,
    CUTS,
    KINDS,
    REQUESTS,
    TOKENS,
    Worker,
    alone,
    body,
    folded,
    named,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def drafting(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """MTP, outputs as deltas, and every answer begins with a thought."""
    flags = "--sleep-on-idle", *SPEC_FLAGS, "--incremental-streaming-output"
    parser = "--reasoning-parser", "deepseek-r1"
    model = checkpoints.tiny_glm
    with alone(new, "drafting", tmp_path_factory, *flags, *parser, model=model) as server:
        yield named(server)


@pytest.mark.parametrize("kind", ["plain", "schema", "characters"])
def test_with_drafts_it_goes_on_as_if_never_cut(drafting: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = drafting.generate(**options)
    ids = whole["output_ids"]
    request = body(**options)
    streamed = drafting.stream("/generate", request)
    assert streamed.ids == ids
    for cut in [cut for cut in CUTS if cut < len(ids)]:
        before = drafting.counted()["tokens"]
        resumed = drafting.generate(ids[:cut], **options)
        assert (resumed["output_ids"], resumed["text"]) == (ids, whole["text"]), cut
        assert drafting.counted()["tokens"] - before == cut
    # Cut between two events: the deltas that follow are the rest, however drafts group them.
    for cut in sorted({event.tokens for event in streamed.events})[:-1:5]:
        part = drafting.stream("/generate", request, ids[:cut])
        assert part.ids == ids
        rest = [event.data["text"] for event in streamed.events if event.tokens > cut]
        assert "".join(event.data["text"] for event in part.events) == "".join(rest)


def test_a_thought_goes_on(drafting: Worker) -> None:
    request = {**CHAT, "model": drafting.model, "temperature": 0}
    path = "/v1/chat/completions"
    whole = drafting.stream(path, request)

    def thought(events: list[Any]) -> str:
        deltas = [choice["delta"] for event in events for choice in event.data["choices"]]
        assert not any(delta.get("content") for delta in deltas)
        return "".join(delta.get("reasoning_content") or "" for delta in deltas)

    assert thought(whole.events)
    for cut in sorted({event.tokens for event in whole.events} - {0})[:-1:4]:
        part = drafting.stream(path, request, whole.ids[:cut])
        assert part.ids == whole.ids
        assert thought(part.events) == thought(whole.after(cut))
        usages = [stream.events[-1].data["usage"] for stream in (part, whole)]
        # Stock counts tokens of thought that a verification accepts beyond the limit.
        counts = [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages]
        assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def overlapping(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A step is prepared before the one before it has been read, as on a GPU."""
    flags = tuple(flag for flag in COMMON_FLAGS if flag != "--disable-overlap-schedule")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lab_server, "COMMON_FLAGS", flags)
        with alone(new, "overlapping", tmp_path_factory) as server:
            info = server.get("/server_info").body
            assert info["disable_overlap_schedule"] is False
            yield Worker(server, "model")


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_overlap_schedule_tokens_are_counted_as_late(
    overlapping: Worker, kind: str
) -> None:
    options = KINDS[kind]
    ids = overlapping.generate(**options)["output_ids"]
    for cut in [cut for cut in (*CUTS, 2, 12, 30) if cut < len(ids)]:
        assert overlapping.generate(ids[:cut], **options)["output_ids"] == ids, cut


@pytest.fixture(scope="module")
def older(old: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A release whose requests hold lists. It has no grammars on a CPU, and its /v1/responses sends
    nothing before the answer is whole."""
    with alone(old, "older", tmp_path_factory) as server:
        yield named(server)


@pytest.mark.parametrize("kind", ["plain", "frequency", "presence", "repetition"])
def test_an_older_release_goes_on_as_if_never_cut(older: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = older.generate(**options)
    for cut in CUTS:
        before = older.counted()["tokens"]
        resumed = older.generate(whole["output_ids"][:cut], **options)
        assert (resumed["output_ids"], resumed["text"]) == (whole["output_ids"], whole["text"])
        assert older.counted()["tokens"] - before == cut


@pytest.mark.parametrize("kind", ["completions", "chat", "messages"])
def test_a_stream_of_an_older_release_goes_on(older: Worker, kind: str) -> None:
    path, request = REQUESTS[kind]
    request = {**request, "model": older.model, "temperature": 0}
    whole = older.stream(path, request)
    assert whole.cuts(6)
    for cut in whole.cuts(6):
        resumed = older.stream(path, request, whole.ids[:cut])
        assert resumed.ids == whole.ids, cut
        assert folded(resumed.events) == folded(whole.after(cut)), cut


@pytest.mark.parametrize("stream", [False, True])
def test_an_older_release_refuses_what_has_ended(older: Worker, stream: bool) -> None:
    answer = older.post("/generate", body([300] * TOKENS, stream=stream))
    assert answer.status == 400
    assert "nothing is left to generate" in answer.body["error"]["message"]
    stop = {"stop": ["w300w30"]}
    answer = older.post("/generate", body([300, 301, 302, 303], stream=stream, **stop))
    assert answer.status == 400 and "'w300w30'" in answer.body["error"]["message"]
