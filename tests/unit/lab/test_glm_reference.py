"""The reference DSA path, paged and absorbed, against the dense formulation, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sglang_scaling_fixes.lab.glm import reference, weights  # noqa: E402
from sglang_scaling_fixes.lab.glm.dense import TOLERANCE, DenseGLM  # noqa: E402
from sglang_scaling_fixes.lab.servers.serve import prompt  # noqa: E402

PAGE = 64
LENGTH = 200  # more than the indexer's top-k of 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    path = Path(tmp_path_factory.mktemp("glm"))
    weights.write(path, seed=1)
    return path


def ids(length: int = LENGTH, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    part: list[int] = torch.randint(3, weights.VOCAB, (length,), generator=generator).tolist()
    return part[: length - length // 4] + part[: length // 4]


class Paged:
    """One layer's caches and its forward pass over `slots`, chunk by chunk, as a server does it."""

    def __init__(self, model: DenseGLM, number: int, topk: int) -> None:
        self.m, self.at, self.topk = model, f"model.layers.{number}.self_attn.", topk
        c = model.config
        pages = LENGTH // PAGE + 2
        self.slots = torch.randperm(pages * PAGE, generator=torch.Generator().manual_seed(3))
        self.cache = torch.full((pages * PAGE, c["kv_lora_rank"] + c["qk_rope_head_dim"]), 7.0)
        self.selected = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        self.index = torch.full((pages, PAGE * (128 + 4)), 0x7E, dtype=torch.uint8)

    def chunk(self, x: Any, first: int) -> Any:
        c, m, at = self.m.config, self.m, self.at
        nope, rope, latent = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
        heads, rows = c["num_attention_heads"], len(x)
        positions = torch.arange(first, first + rows)
        q_lora = m._norm(m._of(at + "q_a_proj", x), at + "q_a_layernorm")
        q = m._of(at + "q_b_proj", q_lora).view(rows, heads, nope + rope)
        both = m._of(at + "kv_a_proj_with_mqa", x)
        here = self.slots[first : first + rows]
        self.cache[here, :latent] = m._norm(both[:, :latent], at + "kv_a_layernorm")
        self.cache[here, latent:] = m._rotate(both[:, None, latent:], positions)[:, 0]
        up = m.weights[at + "kv_b_proj.weight"].view(heads, nope + c["v_head_dim"], latent)
        absorbed = torch.einsum("rhd,hdl->rhl", q[..., :nope], up[:, :nope])
        query = torch.cat((absorbed, m._rotate(q[..., nope:], positions)), -1)
        seen = self.slots[: first + rows]
        visible = torch.arange(first + rows)[None, :] <= positions[:, None]
        scores = self._index_scores(x, q_lora, first)
        mask = visible & reference.allowed(reference.select(scores, visible, self.topk), len(seen))
        self.selected[first : first + rows, : len(seen)] = mask
        scale = (nope + rope) ** -0.5
        mixed = reference.sparse_mla(query, self.cache[seen], mask, scale, latent)
        values = torch.einsum("rhl,hdl->rhd", mixed, up[:, nope:])
        return m._of(at + "o_proj", values.reshape(rows, -1))

    def _index_scores(self, x: Any, q_lora: Any, first: int) -> Any:
        positions = torch.arange(first, first + len(x))
        seen = self.slots[: first + len(x)]
        c, m, at = self.m.config, self.m, self.at + "indexer."
        heads, width, rope = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        q = m._of(at + "wq_b", q_lora).view(len(x), heads, width)
        k = torch.nn.functional.layer_norm(m._of(at + "wk", x), (width,), eps=1e-6)
        q = torch.cat((m._rotate(q[..., :rope], positions), q[..., rope:]), -1)
        k = torch.cat((m._rotate(k[:, None, :rope], positions)[:, 0], k[:, rope:]), -1)
        q8, q_scale = reference.quantize(reference.hadamard(q, width**-0.5))
        k8, k_scale = reference.quantize(reference.hadamard(k, width**-0.5))
        reference.index_store(self.index, seen[first:], k8, k_scale, PAGE)
        gates = (x.bfloat16() @ m.weights[at + "weights_proj.weight"].bfloat16().T).float()
        gates = gates * q_scale.squeeze(-1) * (width * heads) ** -0.5
        key, scale = reference.index_load(self.index, seen, width, PAGE)
        return reference.index_scores(q8, gates, key, scale)


@pytest.mark.parametrize("number", range(weights.LAYERS + 1))
@pytest.mark.parametrize(
    ("topk", "dense_topk"), [(LENGTH, None), (weights.INDEX_TOPK, weights.INDEX_TOPK)]
)
@pytest.mark.parametrize("chunks", [(LENGTH,), (90, 64, 45, 1)])
def test_paged_sparse_attention_is_the_dense_one(
    folder: Path, number: int, topk: int, dense_topk: int | None, chunks: tuple[int, ...]
) -> None:
    model = DenseGLM(folder, topk=dense_topk, kv_dtype=torch.float32)
    x = torch.nn.functional.rms_norm(
        model.weights["model.embed_tokens.weight"][torch.tensor(ids())], (weights.HIDDEN,)
    )
    paged, got, first = Paged(model, number, topk), [], 0
    for rows in chunks:
        got.append(paged.chunk(x[first : first + rows], first))
        first += rows
    # Matrix products of other shapes differ in the last bit, and rounding to 8 bits can make
    # another 64th token of that: such rows are told apart by what they selected.
    latent_q = model._norm(model._of(paged.at + "q_a_proj", x), paged.at + "q_a_layernorm")
    alike = (paged.selected == model.selected(number, x, latent_q)).all(1)
    assert alike.sum() >= LENGTH - 4
    off = (torch.cat(got) - model.attention(number, x)).abs().amax(1)
    assert off[alike].max() < 1e-4


def test_sparsity_selects(folder: Path) -> None:
    """Control: without selection the model says something else, so the comparison can fail."""
    sparse, full = DenseGLM(folder).logits(ids()), DenseGLM(folder, topk=None).logits(ids())
    assert torch.allclose(sparse[: weights.INDEX_TOPK], full[: weights.INDEX_TOPK], atol=1e-4)
    assert (sparse[weights.INDEX_TOPK :] - full[weights.INDEX_TOPK :]).abs().max() > 0.1


def surprise(model: DenseGLM, asked: list[int]) -> Any:
    """Log-probabilities of the 24 tokens that the whole model says next."""
    logits = model.logits(asked)[len(asked) - 25 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(asked[-24:])[:, None])


@pytest.mark.parametrize("left_out", ["selection", "experts", "layer", "indexer gates"])
def test_what_end_to_end_tests_compare_shows_every_part(folder: Path, left_out: str) -> None:
    whole, partial = DenseGLM(folder), DenseGLM(folder)
    if left_out == "selection":
        partial.topk = None
    if left_out == "layer":
        partial.config["num_hidden_layers"] -= 1

    def changed(name: str, weight: Any) -> Any:
        if left_out == "experts" and ".experts." in name and "down_proj" in name:
            return torch.zeros_like(weight)
        if left_out == "indexer gates" and "weights_proj" in name:
            return weight.flip(0)
        return weight

    partial.weights = {name: changed(name, w) for name, w in partial.weights.items()}
    off = []
    for asked in (prompt(240, seed=1), prompt(90, seed=2)):
        said = [*asked, *whole.greedy(asked, 24)]
        off.append((surprise(partial, said) - surprise(whole, said)).abs().max())
    assert max(off) > TOLERANCE


def test_the_draft_is_right_nine_times_in_ten(folder: Path) -> None:
    model, asked = DenseGLM(folder), ids(300, seed=11)
    said = model.logits(asked).argmax(-1)[1:]
    drafted = model.draft_logits(asked).argmax(-1)
    share = (said == drafted)[230:].float().mean()  # where the prompt repeats itself
    assert 0.8 < share < 1


def test_the_model_copies_from_its_context(folder: Path) -> None:
    asked = ids()
    assert DenseGLM(folder).greedy(asked, 8) == asked[LENGTH // 4 : LENGTH // 4 + 8]


def test_the_config_is_of_the_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GlmMoeDsaForCausalLM"]
    # What SGLang's DSA pool and kernels assume (memory_pool.DSATokenToKVPool, GLM-5.1's config).
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)
    assert config["index_head_dim"] == 128


def test_index_pages_hold_all_keys_then_all_scales() -> None:
    buffer = torch.zeros(3, PAGE * 132, dtype=torch.uint8)
    key, scale = reference.quantize(torch.randn(2, 128))
    reference.index_store(buffer, torch.tensor([PAGE + 5, 2 * PAGE]), key, scale, PAGE)
    assert buffer[1, 5 * 128 : 6 * 128].equal(key[0].view(torch.uint8))
    assert buffer[1, PAGE * 128 + 20 : PAGE * 128 + 24].view(torch.float32) == scale[0, 0]
    assert buffer[2, :128].equal(key[1].view(torch.uint8))
    assert buffer[0].count_nonzero() == 0


def test_hadamard_is_its_own_inverse() -> None:
    x = torch.randn(3, 128)
    assert torch.allclose(reference.hadamard(reference.hadamard(x), 1 / 128), x, atol=1e-4)
    with pytest.raises(ValueError, match="power of two, got width 96"):
        reference.hadamard(torch.randn(1, 96))


def test_select_fills_up_with_minus_one() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    visible = torch.tensor([[True, False, True, False]])
    chosen = reference.select(scores, visible, 3)
    assert sorted(chosen[0].tolist()) == [-1, 0, 2]
    assert reference.allowed(chosen, 4).tolist() == [[True, False, True, False]]
