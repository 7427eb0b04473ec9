"""Writes the lab's tiny GLM-5.1 checkpoint; runs in a release's own Python (numpy, safetensors).

The architecture is GLM-5.1's in small: MLA with the real latent, rope and head ranks, an
indexer with the real index-K width, one dense layer, mixture-of-experts layers and an MTP
layer. The weights are random, but not only: random weights alone make a model whose
speculative drafts are never accepted and whose answers hardly depend on its KV cache.
So beside the noise the matrices hold an *induction* circuit, the part of a trained model
that copies from its context:

    residual   | A: this token | B: the one before | B2: two before | N: noise | C: next | 1 |
    layer 0      heads 0 and 1 attend one and two positions back and write B and B2
    layer 1      head 0 finds where (this, before) stood in the prompt: query (A, B) against
                 key (B, B2); what stood there, its A, goes to C, which the LM head reads;
                 head 1 takes the token itself out of C
    MTP layer    the same circuit, one token ahead: its A is the drafted token's embedding

Each look-up goes through the KV cache and through the indexer's top-k, so a page that is
not the request's own changes the answer, and the draft, whose KV lies elsewhere, stops
being accepted. Where nothing in the context matches, the noise decides.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

HIDDEN = 512
VOCAB = 4096
CONTEXT = 8192
LAYERS = 3  # unless told otherwise: one dense, two with experts; the MTP layer follows
HEADS = 4
Q_LORA, KV_LORA, ROPE, NOPE, V_DIM = 256, 512, 64, 192, 256  # GLM-5.1's, but for Q_LORA (2048)
INDEX_HEADS, INDEX_DIM = 4, 128
INDEX_TOPK = 64
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 128
DENSE_WIDTH = 512
ROPE_THETA = 1e6

# The residual stream.
CODE, HALF = 128, 64
A, B, B2, N, C, ONE = 0, 128, 256, 320, 383, 511
ONE_VALUE = 8.0

# Root mean square of the residual stream where it is read (what the norms divide by), to make
# circuits of known gain: embedding; after layer 0; after the last layer.
RMS_0, RMS_1, RMS_OUT = 0.71, 0.95, 1.45

POSITION_GAIN = 18.0  # attention logits between a neighbour and the one beyond it
MATCH_GAIN, MATCH_GAIN_2 = 28.0, 14.0  # attention logits of a match of one token, of the next
NOISE_GAIN = 4.0  # attention logits of the random heads
COPY = 2.0  # what a match writes to C
AGAIN = 1.0  # what is taken from C for the token itself: no model says one token for ever
NOISE_OUT = 0.12  # what everything random writes to C, beside COPY
HUSH = 0.15  # of the layers that a longer model has more
DRAFT_NOISE_OUT = 1.4  # and in the MTP layer: a draft that is right nine times in ten


def config(layers: int = LAYERS) -> dict[str, object]:
    """The model's config.json."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "index_head_dim": INDEX_DIM,
        "index_n_heads": INDEX_HEADS,
        "index_topk": INDEX_TOPK,
        "indexer_rope_interleave": True,
        "initializer_range": 0.02,
        "intermediate_size": DENSE_WIDTH,
        "kv_lora_rank": KV_LORA,
        "max_position_embeddings": CONTEXT,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": Q_LORA,
        "qk_head_dim": NOPE + ROPE,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "float32",
        "v_head_dim": V_DIM,
        "vocab_size": VOCAB,
    }


class _Maker:
    """The tensors of one seed."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self.np = np
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, Any] = {}
        # Halves a token's code, keeping inner products.
        self.halve = self.noise(HALF, CODE) * math.sqrt(CODE / HALF)
        # One direction per rope pair, of zero mean (the index-K norm takes the mean away).
        self.arrow: Any = np.zeros(ROPE, np.float32)
        self.arrow[0::4], self.arrow[2::4] = 1.0, -1.0

    def noise(self, rows: int, columns: int, gain: float = 1.0) -> Any:
        values = self.random.standard_normal((rows, columns), dtype=self.np.float32)
        return values * self.np.float32(gain / math.sqrt(columns))

    def zeros(self, rows: int, columns: int) -> Any:
        return self.np.zeros((rows, columns), self.np.float32)

    def turned(self, back: int, gain: float = 1.0) -> Any:
        """The arrow as a query that fits best a key `back` positions before."""
        np = self.np
        angle = back * ROPE_THETA ** (-np.arange(0, ROPE, 2) / ROPE)
        turned = np.empty(ROPE, np.float32)
        # A key at n is turned by n, a query at m by m: the query must lag by `back`.
        turned[0::2] = self.arrow[0::2] * np.cos(-angle) * gain
        turned[1::2] = self.arrow[0::2] * np.sin(-angle) * gain
        return turned

    def top(self) -> None:
        np = self.np
        codes = self.random.choice(np.array([-1.0, 1.0], np.float32), (VOCAB, CODE))
        embedding = self.zeros(VOCAB, HIDDEN)
        embedding[:, A : A + CODE] = codes
        noise = self.random.standard_normal((VOCAB, C - N), dtype=np.float32)
        # Of one length, so that the first norm leaves every token's 1 alike: neighbours are
        # told apart by a hundredth of their attention logits.
        embedding[:, N:C] = noise * math.sqrt(C - N) / np.linalg.norm(noise, axis=1)[:, None]
        embedding[:, ONE] = ONE_VALUE
        head = self.zeros(VOCAB, HIDDEN)
        head[:, C : C + CODE] = codes / math.sqrt(CODE)
        head[:, N:C] = self.noise(VOCAB, C - N, 0.2)
        self.tensors["model.embed_tokens.weight"] = embedding
        self.tensors["lm_head.weight"] = head
        self.tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)

    def layer(
        self,
        number: int,
        circuit: str | None,
        rms: float,
        *,
        dense: bool = False,
        noise_out: float = NOISE_OUT,
    ) -> None:
        """A decoder layer whose heads hold `circuit` ("neighbours", "induction" or nothing)."""
        at = f"model.layers.{number}."
        self._attention(at + "self_attn.", circuit, rms, noise_out)
        self._indexer(at + "self_attn.indexer.", circuit, rms)
        if dense:
            self._mlp(at + "mlp.", DENSE_WIDTH, noise_out)
        else:
            self._experts(at + "mlp.", noise_out)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.tensors[at + norm + ".weight"] = self.np.ones(HIDDEN, self.np.float32)

    def _attention(self, at: str, circuit: str | None, rms: float, noise_out: float) -> None:
        np, one = self.np, rms / ONE_VALUE
        # Latent of the query: A, half of B, noise, eight times 1.
        down = self.zeros(Q_LORA, HIDDEN)
        down[:CODE, A : A + CODE] = np.eye(CODE) * rms
        down[CODE : CODE + HALF, B : B + CODE] = self.halve * rms
        down[CODE + HALF : -8, :ONE] = self.noise(Q_LORA - CODE - HALF - 8, ONE)
        down[-8:, ONE] = one
        # Latent of the key: A, B, B2, N, noise; and the arrow, unnormed, as its rope part.
        latent = self.zeros(KV_LORA + ROPE, HIDDEN)
        latent[:C, :C] = np.eye(C) * rms
        latent[C:KV_LORA, :ONE] = self.noise(KV_LORA - C, ONE)
        latent[KV_LORA:, ONE] = self.arrow * one
        query = self.zeros(HEADS * (NOPE + ROPE), Q_LORA)
        key = self.zeros(HEADS * (NOPE + V_DIM), KV_LORA)
        out = self.zeros(HIDDEN, HEADS * V_DIM)
        scale = math.sqrt(NOPE + ROPE)  # attention divides by it
        for head in range(HEADS):
            q = query[head * (NOPE + ROPE) :][: NOPE + ROPE]
            k = key[head * (NOPE + V_DIM) :][: NOPE + V_DIM]
            o = out[:, head * V_DIM :][:, :V_DIM]
            if circuit == "neighbours" and head < 2:
                turned = self.turned(head + 1, POSITION_GAIN * scale)
                q[NOPE:, -8:] = turned[:, None] / 8
                k[NOPE : NOPE + CODE, A : A + CODE] = np.eye(CODE)
                if head == 0:
                    o[B : B + CODE, :CODE] = np.eye(CODE) * 0.8
                else:
                    o[B2 : B2 + HALF, :CODE] = self.halve * 0.8
            elif circuit == "induction" and head == 0:
                q[:CODE, :CODE] = np.eye(CODE) * (MATCH_GAIN * scale / CODE)
                q[CODE:NOPE, CODE : CODE + HALF] = np.eye(HALF) * (MATCH_GAIN_2 * scale / HALF)
                k[:CODE, B : B + CODE] = np.eye(CODE)
                k[CODE:NOPE, B2 : B2 + HALF] = np.eye(HALF)
                k[NOPE : NOPE + CODE, A : A + CODE] = np.eye(CODE)
                o[C : C + CODE, :CODE] = np.eye(CODE) * COPY
            elif circuit == "induction" and head == 1:
                turned = self.turned(0, POSITION_GAIN * scale)
                q[NOPE:, -8:] = turned[:, None] / 8
                k[NOPE : NOPE + CODE, A : A + CODE] = np.eye(CODE)
                o[C : C + CODE, :CODE] = np.eye(CODE) * -AGAIN
            else:
                q[:] = self.noise(NOPE + ROPE, Q_LORA, math.sqrt(NOISE_GAIN))
                k[:] = self.noise(NOPE + V_DIM, KV_LORA, math.sqrt(NOISE_GAIN))
                o[N:C] = self.noise(C - N, V_DIM, 0.5)
                o[C : C + CODE] = self.noise(CODE, V_DIM, noise_out)
        ones = {"q_a_layernorm": Q_LORA, "kv_a_layernorm": KV_LORA}
        for name, width in ones.items():
            self.tensors[f"{at}{name}.weight"] = np.ones(width, np.float32)
        self.tensors[at + "q_a_proj.weight"] = down
        self.tensors[at + "q_b_proj.weight"] = query
        self.tensors[at + "kv_a_proj_with_mqa.weight"] = latent
        self.tensors[at + "kv_b_proj.weight"] = key
        self.tensors[at + "o_proj.weight"] = out

    def _indexer(self, at: str, circuit: str | None, rms: float) -> None:
        """Head 0 finds what the circuit looks for, the others what is near or anything."""
        np, one = self.np, rms / ONE_VALUE
        query = self.noise(INDEX_HEADS * INDEX_DIM, Q_LORA, 0.5 if circuit is None else 0.2)
        key = self.noise(INDEX_DIM, HIDDEN, 0.5)
        key[:ROPE, :] = 0.0
        key[:ROPE, ONE] = self.arrow * one
        if circuit is not None:
            query[:INDEX_DIM] = 0.0
            query[:ROPE, -8:] = self.turned(1)[:, None] / 8
            key[ROPE:] = 0.0
            token = B if circuit == "induction" else A
            key[ROPE:, token : token + CODE] = self.halve * rms
        if circuit == "induction":
            query[:INDEX_DIM] = 0.0
            query[ROPE:INDEX_DIM, :CODE] = self.halve * 2.0
            query[INDEX_DIM : INDEX_DIM + ROPE, -8:] = self.turned(0)[:, None] / 8
        gate = self.noise(INDEX_HEADS, HIDDEN, 0.1)
        gate[:, ONE] = one
        self.tensors[at + "wq_b.weight"] = query
        self.tensors[at + "wk.weight"] = key
        self.tensors[at + "k_norm.weight"] = np.ones(INDEX_DIM, np.float32)
        self.tensors[at + "k_norm.bias"] = np.zeros(INDEX_DIM, np.float32)
        self.tensors[at + "weights_proj.weight"] = gate

    def _mlp(self, at: str, width: int, noise_out: float) -> None:
        down = self.zeros(HIDDEN, width)
        down[N:C] = self.noise(C - N, width, 0.3)
        down[C : C + CODE] = self.noise(CODE, width, noise_out)
        self.tensors[at + "gate_proj.weight"] = self.noise(width, HIDDEN)
        self.tensors[at + "up_proj.weight"] = self.noise(width, HIDDEN)
        self.tensors[at + "down_proj.weight"] = down

    def _experts(self, at: str, noise_out: float) -> None:
        self.tensors[at + "gate.weight"] = self.noise(EXPERTS, HIDDEN, 2.0)
        self.tensors[at + "gate.e_score_correction_bias"] = self.np.zeros(EXPERTS, self.np.float32)
        for expert in range(EXPERTS):
            self._mlp(f"{at}experts.{expert}.", EXPERT_WIDTH, noise_out)
        self._mlp(at + "shared_experts.", EXPERT_WIDTH, noise_out)

    def hush(self, number: int) -> None:
        """Noise adds up: what is beyond the usual layers says little, so that rounding KV changes
        log-probabilities no more than in three layers."""
        out = "o_proj.weight", "down_proj.weight"
        for name in self.tensors:
            if name.startswith(f"model.layers.{number}.") and name.endswith(out):
                self.tensors[name] *= HUSH

    def draft(self, number: int) -> None:
        """The MTP layer: joins a token's embedding and the target's output for the one before."""
        np, at = self.np, f"model.layers.{number}."
        self.layer(number, "induction", RMS_1, noise_out=DRAFT_NOISE_OUT)
        join = self.zeros(HIDDEN, 2 * HIDDEN)
        embedded, hidden = join[:, :HIDDEN], join[:, HIDDEN:]
        for first, last in ((A, A + CODE), (N, C), (ONE, ONE + 1)):
            embedded[first:last, first:last] = np.eye(last - first) * RMS_0
        hidden[B : B + CODE, A : A + CODE] = np.eye(CODE) * RMS_OUT
        hidden[B2 : B2 + HALF, B : B + CODE] = self.halve * RMS_OUT
        self.tensors[at + "eh_proj.weight"] = join
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            self.tensors[f"{at}{norm}.weight"] = np.ones(HIDDEN, np.float32)


def write(folder: Path, seed: int, layers: int = LAYERS) -> None:
    """Write config.json and model.safetensors (float32, about 60 MB) into `folder`.

    Layers beyond the second hold noise only.
    """
    from safetensors.numpy import save_file

    maker = _Maker(seed)
    maker.top()
    maker.layer(0, "neighbours", RMS_0, dense=True)
    maker.layer(1, "induction", RMS_1)
    for number in range(2, layers):
        maker.layer(number, None, RMS_OUT)
        if number >= LAYERS:
            maker.hush(number)
    maker.draft(layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    save_file(
        {
            name: maker.np.ascontiguousarray(value, dtype=maker.np.float32)
            for name, value in maker.tensors.items()
        },
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
