"""BLT from top to bottom: bytes on the left, patches on the right.

The entropy model decides where patches start. Bytes are embedded with their n-grams, encoded by local layers, pooled to
patches, run through the global transformer, and decoded to bytes, which read the patches that have closed before them.
"""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

from figures._flow import Flow

LEFT, RIGHT = 1.25, 4.05


def draw(colors: Colors) -> Figure:
    """Draw the flow."""
    flow = Flow(colors, 5.3, 6.3)
    ids = flow.box(LEFT, 5.95, "ids of the bytes", "[T]")
    entropy = flow.box(RIGHT, 5.95, "patcher, a ByteLM", "entropy [T]", fill=3)
    layout = flow.box(RIGHT, 5.05, "patch_starts", "PatchLayout: C patches", fill=3)
    embed = flow.box(LEFT, 5.05, "ngram_hash_embed", "[T, D]", fill=0)
    encoder = flow.box(LEFT, 4.0, "encoder layers\nblock_causal_attention", "[T, D]", fill=0)
    pool = flow.box(RIGHT, 4.0, "patch_pool, max\npatch_cross_attention, encode", "[C, K, D]", fill=1)
    wide = flow.box(RIGHT, 2.75, "global transformer\nblock_causal_attention", "[C, G]", fill=1)
    back = flow.box(RIGHT, 1.6, "projection", "[C, K, D]", fill=1)
    decoder = flow.box(
        LEFT, 1.6, "decoder layers, in each\npatch_cross_attention, decode\nblock_causal_attention", "[T, D]", fill=0
    )
    logits = flow.box(LEFT, 0.45, "norm, output matrix", "logits [T, 260]", fill=2)
    flow.arrow(ids.at("right"), entropy.at("left"))
    flow.arrow(entropy.at("bottom"), layout.at("top"))
    flow.arrow(ids.at("bottom"), embed.at("top"))
    flow.arrow(embed.at("bottom"), encoder.at("top"))
    flow.arrow(layout.at("bottom"), pool.at("top"))
    flow.arrow(encoder.at("right"), pool.at("left"))
    flow.arrow(pool.at("bottom"), wide.at("top"))
    flow.arrow(wide.at("bottom"), back.at("top"))
    flow.arrow(back.at("left"), decoder.at("right"))
    flow.arrow(encoder.at("bottom"), decoder.at("top"))
    flow.arrow(decoder.at("bottom"), logits.at("top"))
    return flow.figure
