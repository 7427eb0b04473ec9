"""LayerSplit on the classes of every stock release that has a split: attached, sized, translated.

One process for each release says it all, since an import of SGLang takes a core for ten seconds or
more. It first asks stock, then arms the fix and asks again.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.models import GLM_5_1, PAGE
from sglang_scaling_fixes.paths import ROOT
from tests import child
from tests.contract import wheels
from tests.layersplit.stock import orders, pools, run, sizes, tables, trees
from tests.releases import NEW

RELEASES = wheels.between("0.5.16", NEW)
BEFORE = wheels.between(wheels.RELEASES[0], "0.5.15.post1")
CODE = "from tests.layersplit.stock import run; run.main()"

PUBLISHED = {"unsplit": 457_920, "split": 3_247_296}
"""Tokens of GLM-5.1 over 8 ranks in 26.22 GiB, as sgl-project/sglang #29930 logged them."""
OURS = 3_519_000
"""The least that is asked of ours there, with scratches of 262,144 tokens."""
KV, RAW, INDEX = 656, 576, 132
"""Bytes of a token in a layer: packed fp8, the same without its scales, and index keys."""
OWNED = 10
"""Layers of the fullest of 8 ranks."""
WITH_DRAFT = (
    (sizes.LAYERS + 1)
    / (OWNED + 1)
    * (1 - 2 * sizes.SCRATCH_TOKENS * (KV + INDEX) / sizes.AVAILABLE)
)
"""How many times the tokens of an unsplit pool with its draft: 10 layers and the draft's instead of
78 and the draft's, less the two scratches."""
STOCK_POOL = "sglang.srt.mem_cache.dsa_cache_layer_split:LayerSplitDSATokenToKVPool"
OUR_POOL = "sglang_scaling_fixes.layersplit.pool:LayerSplitDSATokenToKVPool"
WHOLE_POOL = "sglang.srt.mem_cache.memory_pool:DSATokenToKVPool"


@functools.lru_cache(maxsize=1)  # the tests of a folder come release by release
def said(environment: str, release: str) -> Any:
    from sglang_scaling_fixes.lab import install

    made = install.install(environment)
    env = {**cpu_env(made.env), "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = f"{wheels.source(release)}:{ROOT}:{env['PYTHONPATH']}"
    return child.said(made.python, CODE, env=env, mark=run.MARK)


@pytest.fixture
def found(release: str, old: Environment, new: Environment) -> Any:
    result = said((new if release == NEW else old).release, release)
    assert result["file"].startswith(str(wheels.source(release)))
    return result


def counts(release: str) -> dict[str, int]:
    """Bytes of a token on the fullest rank, as stock counts them."""
    kv = RAW if release == "0.5.16" else KV
    indexed = sizes.LAYERS if release in wheels.between("0.5.18", "0.5.21") else OWNED + 1
    whole, split = sizes.LAYERS * (kv + INDEX), (OWNED + 1) * kv + indexed * INDEX
    share = 1 + 1 / sizes.LAYERS  # of the split: up to 0.5.17
    draft = KV + INDEX
    shares = release in wheels.between("0.5.16", "0.5.17")
    return {
        "unsplit": whole,
        "unsplit draft": int(whole * share) if shares else whole + draft,
        "split": split,
        "split draft": int(split * share) if shares else split + draft,
    }


ALLOCATED = {
    "unsplit": sizes.LAYERS * (KV + INDEX),
    "unsplit draft": (sizes.LAYERS + 1) * (KV + INDEX),
    "split": (OWNED + 1) * (KV + INDEX),
    "split draft": (OWNED + 2) * (KV + INDEX),
}
"""What stock's pools take for it, their scratch among it; every release alike."""


@pytest.mark.parametrize("release", RELEASES)
def test_what_stock_counts_and_what_it_allocates(release: str, found: Any) -> None:
    """Stock's faults in sizing are shown as such, so that a release without them is noticed."""
    stock = found["stock"]["sizes"]
    assert {name: size["allocated"] for name, size in stock.items()} == ALLOCATED
    assert {name: size["bytes"] for name, size in stock.items()} == counts(release)
    for name, size in stock.items():
        too_much = size["tokens"] * size["allocated"] > sizes.AVAILABLE
        assert too_much == (size["bytes"] < size["allocated"]), name
        if name in PUBLISHED and size["bytes"] == size["allocated"]:
            assert size["tokens"] == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.mark.parametrize("release", RELEASES)
def test_ours_counts_what_it_allocates(release: str, found: Any) -> None:
    ours = found["sizes"]
    row, pages = KV + INDEX, ours["scratch"]
    assert pages == sizes.SCRATCH_TOKENS // PAGE
    for name, layers in (("split", OWNED), ("split draft", OWNED + 1)):
        size = ours[name]
        assert size["bytes"] == size["allocated"] == layers * row
        left = sizes.AVAILABLE - 2 * pages * PAGE * row - size["tokens"] * size["allocated"]
        assert 0 <= left < PAGE * size["allocated"]
    assert ours["split"]["tokens"] >= OURS
    whole = sizes.AVAILABLE // ALLOCATED["unsplit draft"]
    assert ours["split draft"]["tokens"] / whole == pytest.approx(WITH_DRAFT, rel=1e-3)
    assert pytest.approx(7.08, rel=5e-3) == WITH_DRAFT
    # A pool that is not split is stock's business.
    assert ours["unsplit"] == found["stock"]["sizes"]["unsplit"]


@pytest.mark.parametrize("release", RELEASES)
def test_layers_that_keep_no_index_keys_are_not_counted(release: str, found: Any) -> None:
    """The fullest rank has 10 layers; from 0.5.22 on those that share a top-k keep no keys."""
    shared = found["sizes"]["shared"]
    assert shared["bytes"] == max(shared["allocated"])
    elides = release in wheels.between("0.5.22", NEW)
    assert (shared["bytes"] < OWNED * (KV + INDEX)) == elides


@pytest.mark.parametrize("release", RELEASES)
def test_the_planner_says_the_same(release: str, found: Any) -> None:
    for name, mtp in (("split", "none"), ("split draft", "whole")):
        plan = Pool(
            model=GLM_5_1,
            ranks=sizes.RANKS,
            dtype="fp8",
            memory=sizes.AVAILABLE,
            mtp=mtp,
            scratch_tokens=sizes.SCRATCH_TOKENS,
            chunk=8192,
        )
        assert plan.ours() == found["sizes"][name]["tokens"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_scratch_without_room_for_a_context_is_refused(release: str, found: Any) -> None:
    refused = found["other order"]["refused"]
    assert "\n" not in refused["said"]
    for part in ("--layer-split-scratch-tokens", orders.TOO_FEW_TOKENS, sizes.CONTEXT):
        assert str(part) in refused["said"]
    assert refused["with it"] is None
    assert str(refused["number"]) in refused["with one less"]


@pytest.mark.parametrize("release", RELEASES)
def test_stock_builds_our_pool(release: str, found: Any) -> None:
    built = dict(found["pools"])
    assert built.pop("draft") == WHOLE_POOL
    assert list(built) == list(found["stock"]["pools"])
    for name, ours in built.items():
        stock, rank = found["stock"]["pools"][name], int(name[-1])
        assert (stock["class"], ours["class"]) == (STOCK_POOL, OUR_POOL)
        # The first rank has one layer more.
        assert ours["owned"] == [[0, 3], [3, pools.LAYERS]][rank]
        assert ours["names"]["layer_shard_start"] == ours["owned"][0]
        for part in ("names", "owned", "kv", "state"):
            assert ours[part] == stock[part], f"{name}: {part}"
        assert len(ours["kv"][0]) == ours["owned"][1] - ours["owned"][0]
        assert ours["pointers"]
        assert ours["channel"] == list(range(pools.RANKS))
        assert ours["said"] == ours["held"]
        assert ours["said"] - ours["scratches"] == stock["said"]
        # Stock leaves its scratches, a layer of KV and one of index keys, out of what it says.
        assert stock["held"] - stock["said"] == stock["kv"][0][0] + stock["state"][0][0]


@pytest.mark.parametrize("release", RELEASES)
def test_tables_name_the_scratch(release: str, found: Any) -> None:
    cases = {name: case for name, case in found["tables"].items() if not name.endswith("CP")}
    assert len(cases) == 4
    for name, case in cases.items():
        ragged = name == "packed EXTEND"
        assert case["slots"] == ["page_table_1", *["page_table_1_flattened"] * ragged], name
        assert case["pages"] == ["real_page_table"], name
        decodes = name.endswith("DECODE")
        assert ("real_page_table" in case["unchanged"]) is not decodes, name
        assert case["pages translated"] is decodes, name
        holds(case, name)


@pytest.mark.parametrize("release", RELEASES)
def test_every_rank_makes_the_same_plan_of_rows_that_differ(release: str, found: Any) -> None:
    """Plans from stock's tables would not: they lack the requests of which a rank has no row."""
    assert tables.FEW.new[0] < pools.RANKS
    for dtype in pools.DTYPES:
        split = found["tables"][f"{dtype} CP"]
        assert split["stock's tables differ"]
        assert split["same plan"]
        assert [case["requests"] for case in split["ranks"]] == [2, 1]
        for case in split["ranks"]:
            holds(case, dtype)


def holds(case: dict[str, Any], name: str) -> None:
    """Every table with slots names the scratch, nothing else changed, the bytes are the same."""
    assert case["slots left"] == [], name
    assert case["same names"], name
    assert not set(case["slots"]) & set(case["unchanged"]), name
    touched = {*case["slots"], *["real_page_table"] * case["pages translated"]}
    assert set(case["changed"]) == touched, name
    assert PAGE <= case["smallest row"] <= case["largest row"] < case["scratch rows"], name
    assert case["same bytes"] == dict.fromkeys(case["slots"], True), name
    # Control: without a scratch, what the tables name now is not what stock's named.
    assert not case["untranslated bytes"], name


@pytest.mark.parametrize("release", RELEASES)
def test_new_index_keys_go_to_the_scratch_and_to_their_owner(release: str, found: Any) -> None:
    stores = found["stores"]
    for how in ("fallback", "fused"):
        for rank, owner in enumerate((True, None)):
            assert stores[f"{how} {rank}"] == {
                "something": True,
                "scratch": True,
                "nothing else": True,
                "owner": owner,
                "error": "",
            }, f"{how}, rank {rank}"


@pytest.mark.parametrize("release", RELEASES)
def test_control_stocks_own_store_leaves_the_scratch_without(release: str, found: Any) -> None:
    """It takes one buffer for itself. Ours gives none, rather than one for the wrong slots."""
    for case in found["stores"]["stock's method"]:
        assert not case["scratch"] and case["nothing else"]
        assert not case["owner"]
        assert "no tables to read index keys in place" in case["error"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_fused_store_can_be_given_other_slots(release: str, found: Any) -> None:
    parameters = found["stores"]["parameters"]
    assert {"forward_batch", "layer_id", "out_cache_loc"} <= set(parameters)
    by_name = {"POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"}
    assert set(parameters.values()) <= by_name


@pytest.mark.parametrize("release", RELEASES)
def test_both_orders_of_arming_leave_both_in_force(release: str, found: Any) -> None:
    for name, order in (("order", orders.ORDERS[0]), ("other order", orders.ORDERS[1])):
        armed = found[name]
        assert list(armed["proofs"]) == list(order)
        for fix, status in armed["states"].items():
            assert status["state"] in ("armed", "native"), f"{name}: {fix}: {status['reason']}"
        assert armed["states"][orders.SPLIT]["state"] == "armed"
        assert armed["ours is built"]
        assert armed["waits"] and all(armed["waits"].values())
    # The prefetch of stock's pool is ordered where nobody replaced that pool, and only there.
    assert "LayerSplit prefetch" in found["order"]["proofs"][orders.HICACHE]
    assert "LayerSplit prefetch" not in found["other order"]["proofs"][orders.HICACHE]


ASK = """
import json
from sglang_scaling_fixes import fixes
from sglang_scaling_fixes.config import Config
states = fixes.arm_all(Config(fixes=("layer-split",)))
print("states:" + json.dumps({state.name: state.as_dict() for state in states}))
"""


@pytest.mark.parametrize("release", [BEFORE[0], BEFORE[-1]])
def test_a_release_without_a_split_is_unsupported(release: str, old: Environment) -> None:
    env = cpu_env(old.env)
    env["PYTHONPATH"] = f"{wheels.source(release)}:{env['PYTHONPATH']}"
    states = child.said(old.python, ASK, env=env, mark="states:")
    assert states["layer-split"]["state"] == "unsupported"
    assert "no --enable-dsa-cache-layer-split" in states["layer-split"]["reason"]


UNIFIED = wheels.between("0.5.19", NEW)
"""Releases whose tree is UnifiedRadixCache unless told otherwise. It gives nodes by number."""


@pytest.mark.parametrize("release", UNIFIED)
def test_two_requests_of_the_releases_own_tree_share_what_they_share(
    release: str, found: Any
) -> None:
    assert "python" in found["trees"]
    for seen in found["trees"].values():
        assert seen["last"] == "int"
        if seen["core"].startswith("Rust") and not seen["ends"][0]:
            continue  # before 0.5.22 it cannot say
        ends = [trees.PREFIX * trees.PAGE, trees.COMMON * trees.PAGE]
        assert seen["ends"] == [ends, ends]
        assert seen["shared"] == 1
        assert seen["both fit"]
        assert not seen["both fit unseen"]  # the control
