"""MegaByte from top to bottom: bytes on the left, patches of P bytes on the right.

The embeddings of the P bytes of the patch before, end to end, run through the global transformer. Its output is cut
into P parts, one for each byte, to which the embedding of the byte before is added. Local layers within each patch
predict its bytes.
"""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

from figures._flow import Flow

LEFT, RIGHT = 1.25, 4.05


def draw(colors: Colors) -> Figure:
    """Draw the flow."""
    flow = Flow(colors, 5.3, 4.6)
    ids = flow.box(LEFT, 4.25, "ids of the bytes", "[T]")
    embed = flow.box(RIGHT, 4.25, "P bytes of the patch before", "[C, P · G/P] = [C, G]", fill=1)
    wide = flow.box(RIGHT, 3.2, "global transformer\nblock_causal_attention", "[C, G]", fill=1)
    parts = flow.box(RIGHT, 2.1, "cut in P, one matrix", "[C · P, D]", fill=1)
    before = flow.box(LEFT, 3.2, "embedding of the byte before", "[T + R, D]", fill=0)
    local = flow.box(LEFT, 2.1, "sum, local layers in each patch\nblock_causal_attention", "[T + R, D]", fill=0)
    logits = flow.box(LEFT, 0.95, "norm, output matrix", "logits [T, 260]", fill=2)
    flow.arrow(ids.at("right"), embed.at("left"))
    flow.arrow(ids.at("bottom"), before.at("top"))
    flow.arrow(embed.at("bottom"), wide.at("top"))
    flow.arrow(wide.at("bottom"), parts.at("top"))
    flow.arrow(parts.at("left"), local.at("right"))
    flow.arrow(before.at("bottom"), local.at("top"))
    flow.arrow(local.at("bottom"), logits.at("top"))
    return flow.figure
