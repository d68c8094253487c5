"""Train a tiny BLT on the standard library and let it write.

Run it by ``python examples/train_and_generate.py [STEPS]``.
"""

# %% The text: modules of the standard library, in pieces of 512 bytes. A batch has
# four pieces, packed end to end.
import random
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig
from blt_kernels.nn import TransformerConfig

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
PIECE, BATCH = 512, 4
random.seed(0)
torch.manual_seed(0)
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = b"".join(file.read_bytes() for file in files)
pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
random.shuffle(pieces)
heldout, pieces = pieces[:16], pieces[16:]
print(f"{len(text) / 1e6:.1f} MB in {len(files)} files")

# %% The model: a small BLT-Space. An entropy model as patcher would cost more than
# all of its layers.
config = replace(
    BLTConfig.small(),
    encoder=TransformerConfig(128, 1, 2, window=64),
    global_transformer=TransformerConfig(256, 2, 4),
    decoder=TransformerConfig(128, 1, 2, window=64),
    patching="space",
    patcher=None,
)
model = BLT(config)
parameters = list(model.parameters())
tables = model.encoder_hash_tok_embedding.weight.numel()
total = sum(parameter.numel() for parameter in parameters)
print(f"{total / 1e6:.1f} M parameters, {tables / 1e6:.1f} M of them in hash tables")


# %% The loss is bits per byte. A byte that nothing is known about takes 8.
@torch.no_grad()
def measure() -> float:
    """Return the bits per byte of pieces that were not trained on."""
    return model.loss(*bk.to_ids(heldout)).item()


optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 3e-3, STEPS + 1, pct_start=0.1
)
begin = time.perf_counter()
for step in range(1, STEPS + 1):
    loss = model.loss(*bk.to_ids(random.sample(pieces, BATCH)))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step in (1, STEPS) or step % 50 == 0:
        speed = step * BATCH * PIECE / (time.perf_counter() - begin)
        print(f"step {step}: {loss:.2f} bits per byte, {speed:,.0f} bytes a second")
print(f"{measure():.2f} bits per byte of text that it has not read")

# %% It writes. Drafts of its own decoder save passes of the global transformer;
# greedy text stays the same.
model.eval()
prompt, texts = "class ", []
for draft in (None, "decoder"):
    out = model.generate(prompt, max_new_bytes=64, draft=draft)
    texts.append(out.text[0])
    passes = out.statistics.passes["global"]
    print(f"draft {draft}: the global transformer ran {passes} times for 64 bytes")
print(f"the same text: {texts[0] == texts[1]}\n\n{prompt}", end="")
options = {"max_new_bytes": 160, "temperature": 0.5, "seed": 1}
for piece in model.stream(prompt, text=True, **options):
    print(piece, end="", flush=True)
print()
