"""`BLTSteps` decodes with a `BLT` in fixed shapes, one id a row at a time.

An id passes patcher and encoder. Where the rule starts a patch after it, the patch that it ends passes the global
transformer, and then the decoder reads the id. So a step decodes the last id and encodes the next one. The patches that
ids end are a step of their own, which runs only where there are any. It reads as many bytes of each row as a power of
two that holds the longest of these patches, and is captured for each such number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.layout import PatchLayout
from blt_kernels.models.blt_state import BLTState, decode, encode, read_patches
from blt_kernels.models.boundaries import cut_boundaries, rule_boundaries
from blt_kernels.models.captured import FixedByteLM, FixedStarts, Step, Steps, shifted
from blt_kernels.nn.fixed_cache import ROOM, FixedKeys, last_entries, right_aligned, slots_of

_FEWEST_BYTES = 32  # of a row in the step of patches


class BLTSteps(Steps):
    """Decodes with a `BLT`.

    Attributes
    ----------
    patch_starts : list of list of int
        Where the patches of each row start.
    """

    writing = ("decoder",)

    def _prepare(self, state: BLTState) -> None:
        rows, device = state.rows, self.device
        self.row = row = torch.arange(rows, device=device)
        self.reading = ("encoder",) if state.patcher is None else ("patcher", "encoder")

        # Boundary decisions and n-grams are made of the last ids of each row, and of their entropies.
        self.width = width = state.lookback + 1
        self.tail, self.newest = last_entries(state.ids, width)[0].long(), row * width + width - 1
        self.patcher = None
        if state.patcher is not None:
            self.patcher = FixedByteLM(state.patcher)
            (self.entropy,) = last_entries(state.entropy, width)

        # `starts` has the starts of the last patches, the open one last; `rule_start` its start if no patch was cut.
        self.window_encoder, self.window_decoder = state.window_encoder, state.window_decoder
        self.patch_starts = [list(starts) for starts in state.patch_starts]
        first, closed = self._first_read(), state.num_patches
        missing = [[0] * (self.window_encoder - len(starts)) for starts in self.patch_starts]
        self.starts = torch.tensor(
            [zeros + s[-self.window_encoder :] for zeros, s in zip(missing, self.patch_starts, strict=True)],
            device=device,
        )
        self.rule_start = torch.tensor([starts[-1] for starts in state.rule_starts], device=device)
        self.closed = torch.tensor(closed, device=device)
        # The document of the open patch starts with patch `document`, and `next_document` may start the next one.
        documents = state._patch_documents(closed, [n + 2 for n in closed])
        self.document, self.next_document = (
            torch.tensor([starts[i] for starts in documents], device=device) for i in (0, -1)
        )

        self._keep_encoded(state.encoded.read(first, state.lengths), first)

        # Patch p is in slot ``p % window_decoder`` of what the decoder reads. One slot more takes what nobody reads.
        stride = self.window_decoder + 1
        self.patches = [x.new_zeros(rows * stride, *x.shape[1:]) for x in state.patches.flat]
        oldest = [max(0, n - self.window_decoder) for n in closed]
        slots = slots_of(oldest, closed, self.window_decoder, stride, device)
        for x, kept in zip(self.patches, state.patches.read(oldest, closed), strict=True):
            x.index_copy_(0, slots, kept)

        self.byte_starts = FixedStarts(state.starts, device)
        self.byte_start = torch.zeros_like(self.position)
        self.encoder_keys, self.decoder_keys = FixedKeys(state.encoder_keys), FixedKeys(state.decoder_keys)
        self.global_keys = FixedKeys(state.global_keys)
        self.x = torch.zeros_like(self.encoded[-1][:rows])
        self.not_full = torch.zeros(1, dtype=torch.bool, device=device)
        self.close_steps: dict[int, Step] = {}

    @torch.inference_mode(False)
    def _keep_encoded(self, kept: Sequence[Tensor], first: Sequence[int]) -> None:
        """Keep what the encoder made of the bytes of each row from `first` on: byte p in slot ``p % room``."""
        rows = len(first)
        self.room = room = 2 * max(n - begin for n, begin in zip(self.lengths, first, strict=True)) + ROOM
        self.encoded = [x.new_zeros(rows * room, *x.shape[1:]) for x in kept]
        slots = slots_of(first, self.lengths, room, room, self.device)
        for x, values in zip(self.encoded, kept, strict=True):
            x.index_copy_(0, slots, values)

    def _reserve(self, total: int) -> bool:
        patcher = [] if self.patcher is None else [self.patcher.keys]
        moved = [keys.reserve(total) for keys in (*patcher, self.encoder_keys, self.decoder_keys)]
        # No one reads the encoded bytes of a row that has ended.
        pairs = zip(self._first_read(), self.lengths, self._going, strict=True)
        first = [begin if goes else n for begin, n, goes in pairs]
        if max(n - begin for n, begin in zip(self.lengths, first, strict=True)) == self.room:
            slots = slots_of(first, self.lengths, self.room, self.room, self.device)
            self._keep_encoded([x.index_select(0, slots) for x in self.encoded], first)
            self.close_steps.clear()
            moved.append(True)
        return any(moved)

    # --- an id, before its patch closes -------------------------------------------------------------------------------

    def _read(self) -> None:
        model, position = self.model, self.position
        self.tail.copy_(shifted(self.tail, self.ids))
        if self.patcher is not None:
            self.entropy.copy_(shifted(self.entropy, model.ops.token_entropy(self.patcher.extend(self.ids, position))))
        documents = right_aligned((position + 1).clamp(max=self.width), self.width)
        tail = self.tail.flatten()
        self._decide(tail, documents)
        self._start_documents()
        self.byte_start.copy_(self.byte_starts.extend(self.ids, position))
        keys = self.encoder_keys.extend(model.ops, position, self.byte_start)
        states = encode(model, tail, documents, self.newest, position, keys)
        for x, new in zip(self.encoded, states, strict=True):
            x.index_copy_(0, self.row * self.room + position % self.room, new)
        self.x.copy_(states[-1])
        super()._read()

    def _decide(self, tail: Tensor, documents: Documents) -> None:
        """Decide whether a patch starts after the last id of each row."""
        config, width, length = self.model.config, self.width, self.position + 1
        positions = (length[:, None] + torch.arange(-width, 0, device=self.device)).flatten()
        entropy = None if self.patcher is None else self.entropy.flatten()
        rule = rule_boundaries(config, self.model.ops, tail, entropy, documents, positions)
        final = rule
        if config.max_patch_length is not None or config.whole_characters:
            row = self.row[:, None].expand(-1, width).flatten()
            first = length - length.clamp(max=width)
            rule, final = cut_boundaries(
                config, rule, tail, documents, positions, row, first, self.rule_start, self.newest
            )
        self.rule_start.copy_(torch.where(rule.index_select(0, self.newest), length, self.rule_start))
        self.closes.copy_(final.index_select(0, self.newest))

    def _start_documents(self) -> None:
        """Let documents of patches start after the patch that holds an EOS."""
        config = self.model.config
        if config.split_documents and not config.global_across_documents:
            self.document.copy_(torch.where(self.closed >= self.next_document, self.next_document, self.document))
            self.next_document.copy_(torch.where(self.ids == config.eos_id, self.closed + 1, self.next_document))

    # --- patches ------------------------------------------------------------------------------------------------------

    def _first_read(self) -> list[int]:
        """Return the first byte of each row that the next patch reads."""
        return [starts[-self.window_encoder :][0] for starts in self.patch_starts]

    def _close(self, closing: Sequence[bool]) -> None:
        counts = [n - a for n, a, closes in zip(self.lengths, self._first_read(), closing, strict=True) if closes]
        if self.global_keys.reserve(max(self.num_patches) + 1):
            self.close_steps.clear()  # graphs of the old addresses
        width = max(_FEWEST_BYTES, 1 << (max(counts) - 1).bit_length())
        if width not in self.close_steps:
            self.close_steps[width] = Step(partial(self._close_patches, width), self.device)
        self.close_steps[width]()
        for starts, n, closes in zip(self.patch_starts, self.lengths, closing, strict=True):
            if closes:
                starts.append(n)

    def _close_patches(self, width: int) -> None:
        """Pass the patches that end with the last ids; they read at most `width` bytes."""
        model, row, rows, window = self.model, self.row, self.row.shape[0], self.window_encoder
        closing = self.closes & self.alive
        # The bytes of a row before its patches are a patch and a document of their own.
        begin = (self.starts - self.position[:, None] + width).clamp(min=0)
        begin = torch.where(closing[:, None], begin, width)
        ends = F.pad(begin, (0, 1), value=width) + row[:, None] * width
        offsets = F.pad(ends.flatten(), (1, 0)).int()
        per_row = window + 1
        cu_patches = F.pad(torch.stack([row * per_row + 1, (row + 1) * per_row], 1).flatten(), (1, 0)).int()
        cu_bytes = F.pad(torch.stack([ends[:, 0], ends[:, -1]], 1).flatten(), (1, 0)).int()
        byte = torch.arange(rows * width, dtype=torch.int32, device=self.device)
        ids = torch.searchsorted(offsets[1:], byte, right=True, out_int32=True)
        layout = PatchLayout(offsets, cu_patches, ids, ids, offsets, cu_bytes, self.not_full)
        positions = self.position[:, None] + torch.arange(-width, 0, device=self.device)
        slots = (positions % self.room + row[:, None] * self.room).flatten()
        patches = model.local_encoder.pool([x.index_select(0, slots) for x in self.encoded], layout)
        patches = patches.index_select(0, (row + 1) * per_row - 1)

        keys = self.global_keys.extend(model.ops, self.closed, self.document, closing)
        read = read_patches(model, patches, self.closed, keys)
        slot = torch.where(closing, self.closed % self.window_decoder, self.window_decoder)
        for x, new in zip(self.patches, read, strict=True):
            x.index_copy_(0, row * (self.window_decoder + 1) + slot, new)
        self.closed.add_(closing)
        self.starts.copy_(torch.where(closing[:, None], shifted(self.starts, self.position), self.starts))

    # --- the logits of the id -----------------------------------------------------------------------------------------

    def _write(self) -> Tensor:
        model, row, stride = self.model, self.row, self.window_decoder + 1
        read = (row * stride + self.closed.clamp(max=self.window_decoder) - 1).int()
        count = row.shape[0] * stride
        patch = torch.arange(count + 1, dtype=torch.int32, device=self.device)
        bounds = torch.searchsorted(read, patch, out_int32=True)
        cu_patches, cu_bytes = patch[::stride].contiguous(), patch[: row.shape[0] + 1]
        layout = PatchLayout(bounds, cu_patches, read, read, bounds, cu_bytes, self.not_full)
        position = self.position - 1
        keys = self.decoder_keys.extend(model.ops, position, self.byte_start)
        return decode(model, self.x, self.patches, position, keys, layout)
