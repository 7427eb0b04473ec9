"""The tiny GLM-5.1 once more, written down plainly: no cache, no pages, no absorbed matrices.

An independent formulation to check the served one against. Every position's keys and values
are made in full, attention is a dense matrix, and what the indexer does not select is masked.
Float32 throughout but for the indexer, whose keys and queries are rounded to 8 bits as the
index-K cache rounds them: selection is a comparison, and is only comparable after rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_scaling_fixes.lab.glm.reference import pack, unpack

TOLERANCE = 0.02
"""Of log-probabilities, between a server's and this model's: both round KV to bf16, but not the
same last bits. Leaving out the selection, the experts or a layer makes more of a difference."""

_FP8_MAX = 448.0


class DenseGLM:
    """`logits(ids)` of a checkpoint; `topk` overrides the indexer's (None: no selection)."""

    def __init__(
        self,
        folder: Path,
        topk: int | None = -1,
        kv_dtype: torch.dtype = torch.bfloat16,
        packed: bool = False,
    ) -> None:
        from safetensors.torch import load_file

        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights: Mapping[str, Tensor] = load_file(str(folder / "model.safetensors"))
        self.kv_dtype = kv_dtype
        self.packed = packed
        self.topk: int | None = self.config["index_topk"] if topk == -1 else topk

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each position, [len(ids), vocab] float32."""
        return _linear(self.hidden(ids), self.weights["lm_head.weight"])

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The final, normed hidden states, [len(ids), hidden]: what the MTP layer is given."""
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        for number in range(self.config["num_hidden_layers"]):
            x = self._layer(number, x)
        return self._norm(x, "model.norm")

    def draft_logits(self, ids: Sequence[int]) -> Tensor:
        """The MTP layer's logits for the token after next, [len(ids) - 1, vocab]."""
        number = self.config["num_hidden_layers"]
        at = f"model.layers.{number}."
        embedded = self.weights["model.embed_tokens.weight"][torch.tensor(ids[1:])]
        joined = torch.cat(
            (self._norm(embedded, at + "enorm"), self._norm(self.hidden(ids)[:-1], at + "hnorm")), 1
        )
        x = self._layer(number, _linear(joined, self.weights[at + "eh_proj.weight"]))
        return _linear(self._norm(x, at + "shared_head.norm"), self.weights["lm_head.weight"])

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ids that greedy decoding appends."""
        answer: list[int] = []
        for _ in range(tokens):
            answer.append(int(self.logits([*ids, *answer])[-1].argmax()))
        return answer

    def _layer(self, number: int, x: Tensor) -> Tensor:
        at = f"model.layers.{number}."
        x = x + self.attention(number, self._norm(x, at + "input_layernorm"))
        y = self._norm(x, at + "post_attention_layernorm")
        dense = number < self.config["first_k_dense_replace"]
        return x + (self._mlp(at + "mlp.", y) if dense else self._experts(at + "mlp.", y))

    def attention(self, number: int, x: Tensor) -> Tensor:
        """Layer `number`'s attention over all of x, [tokens, hidden]."""
        at, c = f"model.layers.{number}.self_attn.", self.config
        tokens, heads = len(x), c["num_attention_heads"]
        nope, rope, values = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        latent_q = self._norm(self._of(at + "q_a_proj", x), at + "q_a_layernorm")
        q = self._of(at + "q_b_proj", latent_q).view(tokens, heads, nope + rope)
        both = self._of(at + "kv_a_proj_with_mqa", x)
        latent = self._stored(self._norm(both[:, : c["kv_lora_rank"]], at + "kv_a_layernorm"))
        kv = self._of(at + "kv_b_proj", latent).view(tokens, heads, nope + values)
        positions = torch.arange(tokens)
        k_rope = self._stored(self._rotate(both[:, None, c["kv_lora_rank"] :], positions))
        q_rope = self._rotate(q[..., nope:], positions)
        scores = torch.einsum("thd,shd->hts", q[..., :nope], kv[..., :nope])
        scores = scores + torch.einsum("thd,sd->hts", q_rope, k_rope[:, 0])
        seen = self.selected(number, x, latent_q)
        scores = (scores / math.sqrt(nope + rope)).masked_fill(~seen, -math.inf)
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), kv[..., nope:])
        return self._of(at + "o_proj", mixed.reshape(tokens, heads * values))

    def selected(self, number: int, x: Tensor, latent_q: Tensor) -> Tensor:
        """Which positions each may attend to: bool [tokens, tokens], causal, top-k by index."""
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        if self.topk is None or len(x) <= self.topk:
            return causal
        scores = self.index_scores(number, x, latent_q).masked_fill(~causal, -math.inf)
        chosen = torch.zeros_like(causal)
        chosen.scatter_(1, scores.topk(self.topk, dim=1).indices, True)
        return chosen & causal

    def index_scores(self, number: int, x: Tensor, latent_q: Tensor) -> Tensor:
        """The indexer's score of each position for each, [tokens, tokens]."""
        at, c = f"model.layers.{number}.self_attn.indexer.", self.config
        heads, width, rope = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        positions = torch.arange(len(x))
        q = self._of(at + "wq_b", latent_q).view(len(x), heads, width)
        k = torch.nn.functional.layer_norm(
            self._of(at + "wk", x),
            (width,),
            self.weights[at + "k_norm.weight"],
            self.weights[at + "k_norm.bias"],
            1e-6,
        )
        q = torch.cat((self._rotate(q[..., :rope], positions), q[..., rope:]), -1)
        k = torch.cat((self._rotate(k[:, None, :rope], positions)[:, 0], k[:, rope:]), -1)
        spread = _hadamard(width) / math.sqrt(width)
        q, k = _round_fp8(q @ spread), _round_fp8(k @ spread)
        gates = (x.bfloat16() @ self.weights[at + "weights_proj.weight"].bfloat16().T).float()
        dots = torch.einsum("thd,sd->hts", q, k).relu()
        return torch.einsum("th,hts->ts", gates, dots) / math.sqrt(heads * width)

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self._of(at + "gate_proj", x))
        return self._of(at + "down_proj", gate * self._of(at + "up_proj", x))

    def _experts(self, at: str, x: Tensor) -> Tensor:
        c = self.config
        scores = self._of(at + "gate", x).sigmoid()
        chosen = (
            (scores + self.weights[at + "gate.e_score_correction_bias"])
            .topk(c["num_experts_per_tok"], dim=1)
            .indices
        )
        share = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        share = share / share.sum(1, keepdim=True) * c["routed_scaling_factor"]
        y = self._mlp(at + "shared_experts.", x)
        for expert in range(c["n_routed_experts"]):
            y = y + share[:, expert, None] * self._mlp(f"{at}experts.{expert}.", x)
        return y

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE over neighbouring pairs of the last dimension of [tokens, heads, rope]."""
        width = x.shape[-1]
        theta = float(self.config["rope_parameters"]["rope_theta"])
        speeds = theta ** (-torch.arange(0, width, 2) / width)
        angles = positions[:, None, None] * speeds
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.weights[name + ".weight"]

    def _stored(self, x: Tensor) -> Tensor:
        """As a bf16 pool rounds it; and a packed one, which keeps ropes in bf16."""
        if self.packed and x.shape[-1] == self.config["kv_lora_rank"]:
            none = x.new_empty(len(x), 0)
            return unpack(pack(x, none), x.shape[-1])
        return x.to(self.kv_dtype).float()

    def _of(self, name: str, x: Tensor) -> Tensor:
        return _linear(x, self.weights[name + ".weight"])


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def _hadamard(width: int) -> Tensor:
    """The Sylvester matrix of `width`, a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _round_fp8(x: Tensor) -> Tensor:
    """Rounded as the index-K cache stores a row: e4m3 with a power of two for its scale."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = torch.exp2(torch.log2(largest / _FP8_MAX).ceil())
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
