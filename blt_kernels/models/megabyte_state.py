"""The state of a `MegaByte`: slots pass the local model; a patch passes the global one when its first slot appears.

Slot s of a row predicts byte s and reads byte s - 1. A row of n bytes has slots 0 to n, and none if it has no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.models.cross_patch import CrossPatch
from blt_kernels.models.state import ByteState
from blt_kernels.nn import embed_ids, rotary_table, run_layers
from blt_kernels.nn.cache import CachedKeys, KeyCache, RowBuffer, runs
from blt_kernels.nn.matrices import multiply_normed


def read_patches(model: Any, x: Tensor, patch: Tensor, keys: Sequence[CachedKeys]) -> Tensor:
    """Pass patches of a `MegaByte` through the global model; return what their slots add, ``[P * patch_size, D]``."""
    table = rotary_table(patch, model.config.global_transformer, x.dtype)
    x = run_layers(model.global_layers, x, table, list(keys))
    x = model.global_norm(x).unflatten(-1, (model.config.patch_size, -1))
    return model.global_to_local(x.flatten(0, 1))


def read_slots(
    model: Any, ids: Tensor, place: Tensor, parts: Tensor, keys: Sequence[CachedKeys | CrossPatch]
) -> Tensor:
    """Pass slots through the local model. A slot reads the id before it, unless its place in the patch is 0."""
    x = embed_ids(model.local_embed_tokens, ids, None)
    x = torch.where((place == 0)[:, None], model.local_embed_first, x) + parts
    table = rotary_table(place, model.local_config, x.dtype)
    return run_layers(model.local_layers, x, table, list(keys))


class MegaByteState(ByteState):
    """Holds what a `MegaByte` remembers of rows."""

    def __init__(self, model: Any, rows: int, undo: int) -> None:
        super().__init__(model, rows, undo)
        config, place = model.config, {"dtype": self.dtype, "device": self.device}
        size = config.patch_size
        self.global_keys = KeyCache(rows, config.global_transformer, undo, **place)
        # Each slot has what the global output adds to it. The slots of the last patch exist before their bytes.
        self.parts = RowBuffer(rows, [(config.local_transformer.dim,)], undo + 2 * size, **place)
        self.local_keys = KeyCache(rows, model.local_config, undo, **place)

    @property
    def num_patches(self) -> list[int]:
        return list(self.global_keys.end)

    def extend(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        return self._extend(ids, counts, self._read_patches)

    def draft(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        return self._extend(ids, counts, self._repeat_patches)

    def _extend(self, ids: Tensor, counts: Sequence[int], add_patches: Callable[[Sequence[int]], None]) -> Tensor:
        model = self.model
        config = model.config
        self._append(ids, counts)
        first = self.local_keys.end  # the new slots begin there
        stop = _slots(self.ids.end)
        slots = [b - a for a, b in zip(first, stop, strict=True)]
        add_patches(stop)
        self.passes["local"] += 1
        slot = runs(first, slots, self.device)
        place = slot % config.patch_size
        # Slot 0 reads a learned vector in the place of a byte, and predicts the first byte, which is there already.
        begins = [a == 0 and n > 0 for a, n in zip(first, slots, strict=True)]
        begin = [at + b for at, b in zip((0, *accumulate(slots)), begins, strict=False)]
        of_bytes = runs(begin, counts, self.device)
        previous = ids.new_zeros(sum(slots)).index_copy(0, of_bytes, ids) if any(begins) else ids
        (parts,) = self.parts.read(first, stop)
        x = read_slots(model, previous, place, parts, self._local_keys(first, slots, parts.dtype))
        for buffer in self._buffers():
            buffer.trim()
        return multiply_normed(model.norm, x.index_select(0, of_bytes) if any(begins) else x, model.lm_head)[0]

    def _read_patches(self, stop: Sequence[int]) -> None:
        """Pass the bytes of patches through the global model, for the patches behind them, until every slot has one."""
        model = self.model
        config, size, before = model.config, model.config.patch_size, self.global_keys.end
        after = [-(-n // size) for n in stop]
        counts = [b - a for a, b in zip(before, after, strict=True)]
        if not any(counts):
            return
        self.passes["global"] += 1
        # The new patches read the bytes of the patches before, and convolutions reach further back.
        lookback = sum(n - 1 for n in config.conv_sizes)
        bounds = [max(0, size * (a - 1)) for a in before], [max(0, size * (b - 1)) for b in after]
        begin = [max(0, a - lookback) for a in bounds[0]]
        (ids,) = self.ids.read(begin, bounds[1])
        x = embed_ids(model.global_embed_tokens, ids, None)
        if config.conv_sizes:
            lengths = [b - a for a, b in zip(begin, bounds[1], strict=True)]
            positions = runs([0] * self.rows, lengths, self.device)
            for convolution in model.patch_convolutions:
                x = convolution(x, positions)
            kept = [b - a for a, b in zip(*bounds, strict=True)]
            ends = accumulate(lengths)
            x = x.index_select(0, runs([e - n for e, n in zip(ends, kept, strict=True)], kept, self.device))
        x = x.unflatten(0, (-1, size)).flatten(1)  # one a patch that is not the first of its row
        patch = runs(before, counts, self.device)
        later = patch > 0
        x = model.global_embed_first.repeat(patch.shape[0], 1).index_copy(0, later.nonzero()[:, 0], x)
        parts = read_patches(model, x, patch, self.global_keys.extend(model.ops, counts, [[0]] * self.rows))
        self.parts.write(self.parts.append([size * n for n in counts]), parts)

    def _repeat_patches(self, stop: Sequence[int]) -> None:
        """Give slots that have no patch yet what the global model gave the last patch of their row."""
        size = self.model.config.patch_size
        while any(end < n for end, n in zip(self.parts.end, stop, strict=True)):
            counts = [size if end < n else 0 for end, n in zip(self.parts.end, stop, strict=True)]
            begin = [end - n for end, n in zip(self.parts.end, counts, strict=True)]
            (parts,) = self.parts.read(begin, self.parts.end)
            self.parts.write(self.parts.append(counts), parts)

    def _local_keys(self, first: Sequence[int], slots: Sequence[int], dtype: torch.dtype) -> list[Any]:
        """Return for every layer where the keys of the new slots go, and which keys each slot attends to."""
        model = self.model
        size, reach = model.config.patch_size, model.config.cross_patch
        starts = [list(range(a // size * size, a + n, size)) or [0] for a, n in zip(first, slots, strict=True)]
        keys = self.local_keys.extend(model.ops, slots, starts)
        if not reach:
            return keys
        # Every patch attends to the last keys of the patch before, too: their ranges overlap, so they are copied.
        queries, counts, begin, places = [], [], [], []
        for r, (a, n) in enumerate(zip(first, slots, strict=True)):
            base = r * self.local_keys.capacity - self.local_keys.first[r]
            for start in starts[r] if n else ():
                stop = min(start + size, a + n)
                low = max(0, start - reach)
                queries.append(stop - max(start, a))
                counts.append(stop - low)
                begin.append(base + low)
                places.append(low - start)
        table = rotary_table(runs(places, counts, self.device), model.local_config, dtype)
        of_queries, of_keys = self._offsets(queries), self._offsets(counts)
        slot = runs(begin, counts, self.device)
        return [CrossPatch(of_queries, of_keys, slot, table, own) for own in keys]

    def _offsets(self, counts: Sequence[int]) -> Any:
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=self.device)
        return self.model.ops.offsets(Documents(offsets, sum(counts), sum(counts)))

    def _buffers(self) -> list[RowBuffer]:
        return [*super()._buffers(), self.global_keys, self.parts, self.local_keys]

    def _patches(self, lengths: Sequence[int]) -> list[int]:
        return [-(-n // self.model.config.patch_size) for n in _slots(lengths)]

    def _holds(self, lengths: Sequence[int]) -> list[bool]:
        size, slots = self.model.config.patch_size, _slots(lengths)
        holds = [
            self.global_keys.holds_windows(self._patches(lengths)),
            self.parts.holds([n // size * size for n in slots]),
            self.local_keys.holds([n // size * size - self.model.config.cross_patch for n in slots]),
        ]
        return [all(row) for row in zip(*holds, strict=True)]

    def _truncate(self, lengths: Sequence[int]) -> None:
        super()._truncate(lengths)
        patches = self._patches(lengths)
        self.global_keys.truncate(patches)
        self.parts.truncate([n * self.model.config.patch_size for n in patches])
        self.local_keys.truncate(_slots(lengths))


def _slots(lengths: Sequence[int]) -> list[int]:
    return [n + 1 if n else 0 for n in lengths]
