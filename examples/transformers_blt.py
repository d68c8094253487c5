"""Replace the ops of a BLT of transformers, and compare outputs and times.

Run it by ``python examples/transformers_blt.py``.
"""

# %% A BLT of transformers with random weights. `BltForCausalLM.from_pretrained` gives
# a trained one.
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.blt import BltConfig, BltForCausalLM

import blt_kernels as bk
from blt_kernels.integrations import transformers as integration
from blt_kernels.testing import real_text

torch.manual_seed(0)
part = {"num_attention_heads": 4, "num_hidden_layers": 2}
local = {**part, "hidden_size": 128, "intermediate_size": 352}
local["hidden_size_global"] = 256
wide = {**part, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
config = BltConfig(
    patcher_config={**part, "hidden_size": 64, "intermediate_size": 128},
    encoder_config={**local, "num_hidden_layers": 1},
    decoder_config=local,
    global_config=wide,
    encoder_hash_byte_group_vocab=1000,
    patching_threshold=5.0,  # random weights are nearly as uncertain as can be
)
model = BltForCausalLM(config).eval()
ids = bk.to_ids(real_text(1024)).long()[None]
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"{parameters / 1e6:.1f} M parameters, {ids.shape[1]} bytes")


# %% The same calls, first of transformers alone, then with the ops under it.
def timed(function: Callable[[], Tensor], rounds: int = 3) -> tuple[Tensor, float]:
    """Return the result of a function, and its median time in milliseconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        result = function()
        times.append(1e3 * (time.perf_counter() - begin))
    return result, statistics.median(times)


@torch.no_grad()
def forward() -> Tensor:
    """Return logits ``[1, S, 260]``."""
    return model(ids, use_cache=False).logits


def training() -> Tensor:
    """Return the gradient of the hash tables."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return model.model.encoder_hash_tok_embedding.weight.grad


def generation(cached: bool) -> Callable[[], Tensor]:
    """Return a function that writes 16 bytes behind the first 128."""
    options = {"max_new_tokens": 16, "do_sample": False, "use_cache": cached}
    return lambda: model.generate(ids[:, :128], **options)


stock = [timed(forward), timed(training), timed(generation(False), rounds=1)]
with integration.apply(model) as applied:
    ours = [timed(forward), timed(training), timed(generation(True), rounds=1)]

# %% Logits and gradients agree to rounding. transformers has no cache for BLT that
# works; here there is one.
print("milliseconds: transformers, with our ops, ratio; and how far results differ")
names = ("forward", "training", "generate")
for name, (expected, theirs), (got, mine) in zip(names, stock, ours, strict=True):
    error = (expected - got).abs().max().item()
    print(f"{name:<9} {theirs:8.1f} {mine:8.1f} {theirs / mine:6.1f} {error:10.1e}")

# %% What was replaced, how often it was called, and what was left to transformers.
print(applied.report())
