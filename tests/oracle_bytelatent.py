"""A model of facebookresearch/blt in plain PyTorch with dense masks, one row at a time, from its arguments and weights.

Written from what that code does at 9774ed4, with the masks of its xformers: nothing of blt_kernels is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
PRIMES = (1000000007, 5915587277, 1500450271)


def document_ids(tokens: Sequence[int], eos_id: int) -> Tensor:
    """A document ends with its `eos_id`."""
    before = [sum(token == eos_id for token in tokens[:i]) for i in range(len(tokens))]
    return torch.tensor(before)


def self_attention_mask(tokens: Sequence[int], bias: str | None, eos_id: int, window: int | None) -> Tensor:
    """Return the entries that each entry attends to, bool ``[S, S]``."""
    position = torch.arange(len(tokens))
    mask = position[:, None] >= position
    if bias in ("block_causal", "local_block_causal"):
        documents = document_ids(tokens, eos_id)
        mask &= documents[:, None] == documents
    if bias == "local_block_causal":
        mask &= position[:, None] - position < window
    return mask


def norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * state[f"{name}.weight"]


def heads_of(x: Tensor, state: State, name: str, width: int) -> Tensor:
    """Return the heads of a projection, ``[heads, S, width]``."""
    return (x @ state[f"{name}.weight"].T).unflatten(-1, (-1, width)).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights.nan_to_num(0.0) @ v).transpose(0, 1).flatten(1)  # queries without a key get 0


def turn(x: Tensor, theta: float) -> Tensor:
    """Apply rotary positions to ``[heads, S, width]``: entries 2j and 2j + 1 are one plane."""
    width = x.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(x.shape[1])[:, None] * frequency
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, -1).flatten(-2)


def layer(x: Tensor, state: State, name: str, heads: int, mask: Tensor, args: dict[str, Any]) -> Tensor:
    eps, width = args["norm_eps"], x.shape[-1] // heads
    y = norm(x, state, f"{name}.attention_norm", eps)
    q, k, v = (heads_of(y, state, f"{name}.attention.w{part}", width) for part in "qkv")
    y = attend(turn(q, args["rope_theta"]), turn(k, args["rope_theta"]), v, mask)
    x = x + y @ state[f"{name}.attention.wo.weight"].T
    y = norm(x, state, f"{name}.ffn_norm", eps)
    gate, up = (y @ state[f"{name}.feed_forward.w{part}.weight"].T for part in (1, 3))
    return x + (F.silu(gate) * up) @ state[f"{name}.feed_forward.w2.weight"].T


def cross(x: Tensor, states: Tensor, state: State, name: str, mask: Tensor, args: dict[str, Any]) -> Tensor:
    """The residual comes in here and once more around it."""
    width = x.shape[-1] // args["cross_attn_nheads"]
    q = heads_of(norm(x, state, f"{name}.cross_attn_norm_q", args["norm_eps"]), state, f"{name}.wq", width)
    states = norm(states, state, f"{name}.cross_attn_norm_kv", args["norm_eps"])
    k, v = (heads_of(states, state, f"{name}.w{part}", width) for part in "kv")
    return x + (x + attend(q, k, v, mask) @ state[f"{name}.wo.weight"].T)


def cross_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return whether the key's patch is the query's, or one of the last `window`."""
    q, k = queries[:, None], keys
    return q == k if window is None else (k <= q) & (q < k + window)


def hashes(tokens: Sequence[int], size: int, prime: int, rows: int) -> Tensor:
    """Hash with signed 64-bit integers that wrap around, and a remainder that is not negative."""
    padded = [0] * (size - 1) + list(tokens)
    result = []
    for i in range(len(tokens)):
        total = sum(padded[i + j] * prime**j for j in range(size)) % 2**64
        result.append((total - 2**64 if total >= 2**63 else total) % rows)
    return torch.tensor(result)


def byte_lm_logits(state: State, args: dict[str, Any], tokens: Sequence[int]) -> Tensor:
    """Return the logits of an entropy model, fp64 ``[S, V]``."""
    state = {name: value.double() for name, value in state.items() if not name.endswith("freqs_cis")}
    mask = self_attention_mask(tokens, args["attn_bias_type"], args["eos_id"], args["sliding_window"])
    x = state["tok_embeddings.weight"][torch.tensor(tokens)]
    for i in range(args["n_layers"]):
        x = layer(x, state, f"layers.{i}", args["n_heads"], mask, args)
    return norm(x, state, "norm", args["norm_eps"]) @ state["output.weight"].T


def blt_logits(state: State, args: dict[str, Any], tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return logits of a BLT, fp64 ``[S, V]``; `lengths` of patches sum to S + 1, for the byte to come counts."""
    state = {name: value.double() for name, value in state.items() if not name.endswith("freqs_cis")}
    size, queries = len(tokens), args["cross_attn_k"]
    patch_of = torch.repeat_interleave(torch.tensor(lengths))
    own, read = patch_of[:size], patch_of[1:] - 1  # a byte reads the patch that is complete before the next byte
    patches = len(lengths)
    slots = torch.arange(patches).repeat_interleave(queries)

    x = state["local_encoder.tok_embeddings.weight"][torch.tensor(tokens)]
    table = 0
    for prime in PRIMES[: args["encoder_hash_byte_group_nb_functions"]]:
        for length in args["encoder_hash_byte_group_size"]:
            rows = state[f"encoder_hash_tok_embedding.{table}.weight"]
            x, table = x + rows[hashes(tokens, length, prime, len(rows))], table + 1

    mask = self_attention_mask(tokens, "local_block_causal", args["eos_id"], args["local_attention_window_len"])
    vectors = None
    for i in range(args["n_layers_local_encoder"]):
        x = layer(x, state, f"local_encoder.layers.{i}", args["n_heads_local_encoder"], mask, args)
        every = args["cross_attn_all_layers_encoder"]
        if every or i == args["n_layers_local_encoder"] - 1:
            if vectors is None:
                members = [own == p for p in range(patches)]
                pooled = torch.stack([x[m].amax(0) if m.any() else torch.zeros_like(x[0]) for m in members])
                vectors = (pooled @ state["local_encoder.patch_embedding_projection.weight"].T).view(-1, x.shape[-1])
            name = f"local_encoder.cross_attn_layers.{i if every else 0}"
            unmasked = cross_mask(slots, own, args["cross_attn_window_encoder"])
            vectors = cross(vectors, x, state, name, unmasked, args)
    assert vectors is not None

    h = vectors.view(patches, -1)
    projection = state.get("global_transformer.token_embedding_projection.weight")
    h = h if projection is None else h @ projection.T
    marks = [0] * patches
    for token, patch in zip(tokens, own.tolist(), strict=True):
        if token == 2:
            marks[patch] = 2
    unmasked = self_attention_mask(marks, args["attn_bias_type"], args["eos_id"], None)
    for i in range(args["n_layers_global"]):
        h = layer(h, state, f"global_transformer.layers.{i}", args["n_heads_global"], unmasked, args)

    vectors = (h @ state["local_decoder.patch_embedding_projection.weight"].T).view(-1, x.shape[-1])
    for i in range(args["n_layers_local_decoder"]):
        if i == 0 or args["cross_attn_all_layers_decoder"]:
            unmasked = cross_mask(read, slots, args["cross_attn_window_decoder"])
            x = cross(x, vectors, state, f"local_decoder.cross_attn_layers.{i}", unmasked, args)
        x = layer(x, state, f"local_decoder.layers.{i}", args["n_heads_local_decoder"], mask, args)
    x = norm(x, state, "local_decoder.norm", args["norm_eps"])
    return x @ state["local_decoder.output.weight"].T
