"""The state of a `BLT`: bytes pass patcher, encoder and decoder; a patch passes the global transformer when it closes.

A patch closes with the byte after which the rule starts another one, and that byte already reads it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.layout import PatchLayout
from blt_kernels.models.boundaries import LOOKBACK, cut_boundaries, rule_boundaries
from blt_kernels.models.state import ByteLMState, ByteState, DocumentStarts
from blt_kernels.nn import rotary_table
from blt_kernels.nn.cache import CachedKeys, KeyCache, RowBuffer, numbers, runs


def encode(
    model: Any, ids: Tensor, documents: Documents, new: Tensor, positions: Tensor, keys: Sequence[CachedKeys]
) -> list[Tensor]:
    """Return what the encoder of a `BLT` makes of new ids: the states that patches read, the last one of them last.

    `ids` also has ids before them, for n-grams; the new ones are at `new`, and have these positions in their rows.
    """
    config, ops = model.config, model.ops
    x = ops.ngram_hash_embed(
        ids,
        model.encoder_hash_tok_embedding.weight,
        model.local_encoder.embed_tokens.weight,
        ops.offsets(documents),
        ngram_sizes=config.ngram_sizes,
        num_functions=config.num_functions,
    ).index_select(0, new)
    return model.local_encoder.states(x, rotary_table(positions, config.encoder, x.dtype), list(keys))


def read_patches(model: Any, patches: Tensor, positions: Tensor, keys: Sequence[CachedKeys]) -> list[Tensor]:
    """Pass patches through the global transformer; return the keys and values ``[P, K, G, E]`` that the decoder reads.

    They are those of each cross attention in turn.
    """
    table = rotary_table(positions, model.config.global_transformer, patches.dtype)
    patches = model.global_transformer(patches, table, list(keys))
    return [x for pair in model.local_decoder.keys(patches) for x in pair]


def decode(
    model: Any, x: Tensor, read: Sequence[Tensor], positions: Tensor, keys: Sequence[CachedKeys], layout: PatchLayout,
    head: bool = True,
) -> Tensor:  # fmt: skip
    """Return the logits of encoded bytes, or what `lm_head` reads.

    `read` is what `read_patches` returned for the patches of `layout`.
    """
    table = rotary_table(positions, model.config.decoder, x.dtype)
    pairs = list(zip(read[::2], read[1::2], strict=True))
    decoder = model.local_decoder
    if not head:
        return decoder(x, pairs, table, list(keys), layout)
    return decoder.states(x, pairs, table, list(keys), layout, head=(decoder.norm, model.lm_head))


class BLTState(ByteState):
    """Holds what a `BLT` remembers of rows.

    Attributes
    ----------
    patch_starts : list of list of int
        Where the patches of each row start. The last one is open; it may have no byte yet.
    """

    def __init__(self, model: Any, rows: int, undo: int) -> None:
        super().__init__(model, rows, undo)
        config, place = model.config, {"dtype": self.dtype, "device": self.device}
        encoder, decoder, wide = config.encoder, config.decoder, config.global_transformer
        self.lookback = max(LOOKBACK, *(n - 1 for n in config.ngram_sizes))
        self.patcher = None
        if config.patching == "entropy":
            if model.patcher is None:
                raise ValueError("patcher: expected a ByteLM, since patching is 'entropy', got None")
            reset = config.reset_at_newlines or None
            self.patcher = ByteLMState(model.patcher, rows, undo, reset_at_newlines=reset)
            self.patcher.part, self.patcher.passes = "patcher", self.passes
            exact = torch.float64 if self.patcher.dtype == torch.float64 else torch.float32
            self.entropy = RowBuffer(rows, [()], undo + self.lookback + 1, dtype=exact, device=self.device)
        self.patch_starts: list[list[int]] = [[0] for _ in range(rows)]
        self.rule_starts: list[list[int]] = [[0] for _ in range(rows)]  # those that are no cuts of long patches
        self.starts = DocumentStarts(rows, config.eos_id if config.split_documents else None, None)
        self.encoder_keys = KeyCache(rows, encoder, undo, **place)
        # Cross attention reads the bytes of the open patch, and of those that its window or `truncate` reach.
        self.encoded = RowBuffer(rows, [(encoder.dim,)] * model.local_encoder.num_states, 0, **place)
        self.global_keys = KeyCache(rows, wide, undo, **place)
        cross = config.cross_attention(decoder)
        shape = (config.queries_per_patch, cross.kv_heads, cross.head_dim)
        self.window_encoder = config.cross_attn_window_encoder or 1
        self.window_decoder = config.cross_attn_window_decoder or 1
        count = len(model.local_decoder.cross_attn_layers)
        self.patches = RowBuffer(rows, [shape] * (2 * count), undo + self.window_decoder, **place)
        self.decoder_keys = KeyCache(rows, decoder, undo, **place)
        self.not_full = torch.zeros(1, dtype=torch.bool, device=self.device)

    @property
    def num_patches(self) -> list[int]:
        return list(self.global_keys.end)

    def extend(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        return self._extend(ids, counts, closing=True)

    def draft(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        return self._extend(ids, counts, closing=False)

    def extend_states(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """Do as `extend` does, but return what `lm_head` reads, ``[T, D]``, and leave `lm_head` alone."""
        return self._extend(ids, counts, closing=True, head=False)

    def _extend(self, ids: Tensor, counts: Sequence[int], closing: bool, head: bool = True) -> Tensor:
        model, ops = self.model, self.model.ops
        old, positions = self._append(ids, counts)
        begin = [max(0, n - self.lookback) for n in old]
        tail, documents, new = self._tail(old, begin)
        if closing:
            self._read_patcher(ids, old, counts)
            rule, final = self._cuts(tail, documents, begin, new)
        else:
            rule = final = [False] * sum(counts)
        decode_ids = self._close(rule, final, old, counts)
        self.passes.update(("encoder", "decoder"))

        starts = self.starts.extend(ids, old, counts)
        states = encode(model, tail, documents, new, positions, self.encoder_keys.extend(ops, counts, starts))
        self.encoded.write(self.encoded.append(counts), *states)
        if closing:
            self._read_closed_patches()
        out = self._decode(states[-1], positions, starts, counts, decode_ids, head)
        self._trim()
        return out

    def extend_patcher(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """Append ids to the rows of the patcher alone, which `extend` must be given next; return their logits."""
        assert self.patcher is not None
        logits = self.patcher.extend(ids, counts)
        self.entropy.write(self.entropy.append(counts), self.model.ops.token_entropy(logits))
        return logits

    def _read_patcher(self, ids: Tensor, old: Sequence[int], counts: Sequence[int]) -> None:
        """Pass new ids through the patcher, but for those that `extend_patcher` was given."""
        if self.patcher is None:
            return
        ahead = [a - b for a, b in zip(self.patcher.lengths, old, strict=True)]
        rest = [count - n for count, n in zip(counts, ahead, strict=True)]
        if any(ahead):
            begin = [at + n for at, n in zip(accumulate(counts, initial=0), ahead, strict=False)]
            ids = ids.index_select(0, runs(begin, rest, self.device))
        if any(rest):
            self.extend_patcher(ids, rest)

    def _cuts(self, tail: Tensor, documents: Documents, begin: Sequence[int], new: Tensor) -> list[list[bool]]:
        """Return whether a patch starts after each new id: by the rule itself, and with the cuts of long patches.

        `tail` has the ids of each row from position ``begin[r]`` on; those at `new` are the new ones.
        """
        config = self.model.config
        lengths = [end - b for b, end in zip(begin, self.ids.end, strict=True)]
        entropy = positions = None
        if config.patching == "entropy":
            (entropy,) = self.entropy.read(begin, self.ids.end)
        elif config.patching in ("static", "byte"):
            positions = runs(begin, lengths, self.device)
        boundaries = rule_boundaries(config, self.model.ops, tail, entropy, documents, positions)
        if config.max_patch_length is None and not config.whole_characters:
            return [boundaries.index_select(0, new).tolist()] * 2
        first, start = (
            torch.tensor(values, dtype=torch.int64, device=self.device)
            for values in (begin, [starts[-1] for starts in self.rule_starts])
        )
        row = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=self.device))
        positions = runs(begin, lengths, self.device)
        both = cut_boundaries(config, boundaries, tail, documents, positions, row, first, start, new)
        return [decisions[new].tolist() for decisions in both]

    def _close(
        self, rule: Sequence[bool], final: Sequence[bool], old: Sequence[int], counts: Sequence[int]
    ) -> list[int]:
        """Note where patches start. Return the patch of its row that each new byte reads: the last one that closed."""
        decode_ids, at = [], 0
        for r, (before, count) in enumerate(zip(old, counts, strict=True)):
            starts = self.patch_starts[r]
            for i in range(at, at + count):
                after = before + i - at + 1
                if rule[i]:
                    self.rule_starts[r].append(after)
                if final[i]:
                    starts.append(after)
                decode_ids.append(len(starts) - 2)
            at += count
        return decode_ids

    def _read_closed_patches(self) -> None:
        """Pass the patches that have closed through the global transformer, and keep what the decoder reads of them."""
        model, before = self.model, self.global_keys.end
        after = [len(starts) - 1 for starts in self.patch_starts]
        counts = [a - b for a, b in zip(after, before, strict=True)]
        if not any(counts):
            return
        self.passes["global"] += 1
        # Their windows reach back over patches that were closed before.
        oldest = [b if a == b else max(0, b - self.window_encoder + 1) for a, b in zip(after, before, strict=True)]
        bounds = [starts[p : a + 1] for starts, p, a in zip(self.patch_starts, oldest, after, strict=True)]
        states = self.encoded.read([b[0] for b in bounds], [b[-1] for b in bounds])
        cu_patches = [0, *accumulate(len(b) - 1 for b in bounds)]
        layout = self._layout([y - x for b in bounds for x, y in pairwise(b)], cu_patches)
        patches = model.local_encoder.pool(states, layout)
        if self.window_encoder > 1:
            new = [end - n for end, n in zip(cu_patches[1:], counts, strict=True)]
            patches = patches.index_select(0, runs(new, counts, self.device))
        keys = self.global_keys.extend(model.ops, counts, self._patch_documents(before, after))
        read = read_patches(model, patches, runs(before, counts, self.device), keys)
        self.patches.write(self.patches.append(counts), *read)

    def _layout(self, lengths: Sequence[int], cu_patches: Sequence[int]) -> PatchLayout:
        """Return the layout of patches that read bytes."""
        ends = [0, *accumulate(lengths)]
        ids = torch.tensor([p for p, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32, device=self.device)
        offsets, cu, rows = (
            numbers(values, torch.int32, self.device) for values in (ends, cu_patches, [ends[p] for p in cu_patches])
        )
        return PatchLayout(offsets, cu, ids, ids, offsets, rows, self.not_full)

    def _patch_documents(self, before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
        """Return the patches that documents start with: that of the first new patch, and the later ones."""
        config = self.model.config
        if not config.split_documents or config.global_across_documents:
            return [[0]] * self.rows
        documents = []
        for starts, found, old, new in zip(self.patch_starts, self.starts.found, before, after, strict=True):
            patches = {0}
            for eos, _ in reversed(found):
                following = bisect_right(starts, eos)  # after the patch that holds the EOS
                patches.add(following)
                if following <= old:
                    break
            first = max(p for p in patches if p <= old)
            documents.append(sorted(p for p in patches if first <= p < max(new, first + 1)))
        return documents

    def _decode(
        self, x: Tensor, positions: Tensor, starts: list[list[int]], counts: Sequence[int], decode_ids: Sequence[int],
        head: bool,
    ) -> Tensor:  # fmt: skip
        """Return the logits of the new bytes, or what `lm_head` reads."""
        offsets, closed, window = [0, *accumulate(counts)], self.patches.end, self.window_decoder
        oldest = [
            max(0, decode_ids[at] - window + 1) if count else end
            for at, count, end in zip(offsets, counts, closed, strict=False)
        ]
        cu_patches = [0, *accumulate(end - first for end, first in zip(closed, oldest, strict=True))]
        shift = [p - first for p, first in zip(cu_patches, oldest, strict=False)]
        ids = [d + s for s, at, n in zip(shift, offsets, counts, strict=False) for d in decode_ids[at : at + n]]
        bounds = [bisect_left(ids, patch) for patch in range(cu_patches[-1] + 1)]
        read, reads, cu, rows = (
            numbers(values, torch.int32, self.device) for values in (ids, bounds, cu_patches, offsets)
        )
        # To decode, a layout is read by its decode ids alone.
        layout = PatchLayout(reads, cu, read, read, reads, rows, self.not_full)
        keys = self.decoder_keys.extend(self.model.ops, counts, starts)
        return decode(self.model, x, self.patches.read(oldest, closed), positions, keys, layout, head)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _buffers(self) -> list[RowBuffer]:
        own = [*super()._buffers(), self.encoder_keys, self.encoded, self.global_keys, self.patches, self.decoder_keys]
        return own if self.patcher is None else [*own, self.entropy]

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.patcher.nbytes if self.patcher is not None else 0)

    def _closed(self, lengths: Sequence[int]) -> list[int]:
        """Return how many patches of each row close within its first ``lengths[r]`` bytes."""
        return [bisect_right(starts, n) - 1 for starts, n in zip(self.patch_starts, lengths, strict=True)]

    def _first_encoded(self, lengths: Sequence[int]) -> list[int]:
        """Return the first byte that is read by patches that close after these lengths."""
        closed = self._closed(lengths)
        return [s[max(0, n - self.window_encoder + 1)] for s, n in zip(self.patch_starts, closed, strict=True)]

    def _holds(self, lengths: Sequence[int]) -> list[bool]:
        closed = self._closed(lengths)
        holds = [
            self.encoder_keys.holds_windows(lengths),
            self.decoder_keys.holds_windows(lengths),
            self.global_keys.holds_windows(closed),
            self.encoded.holds(self._first_encoded(lengths)),
            self.patches.holds([n - self.window_decoder for n in closed]),
        ]
        if self.patcher is not None:
            holds += [self.patcher._holds(lengths), self.entropy.holds([n - self.lookback for n in lengths])]
        return [all(row) for row in zip(*holds, strict=True)]

    def _note_needed(self) -> None:
        """Tell the buffer of the encoder's output what patches will read, also after `undo` bytes were taken back."""
        self.encoded.needed = self._first_encoded([max(0, n - self.undo) for n in self.lengths])

    def _trim(self) -> None:
        """Let go of what is neither read again nor needed to take back `undo` bytes."""
        self._note_needed()
        for buffer in self._buffers():
            buffer.trim()

    def _truncate(self, lengths: Sequence[int]) -> None:
        closed = self._closed(lengths)
        super()._truncate(lengths)
        for buffer in (self.encoder_keys, self.encoded, self.decoder_keys):
            buffer.truncate(lengths)
        for buffer in (self.global_keys, self.patches):
            buffer.truncate(closed)
        if self.patcher is not None:
            self.patcher._truncate(lengths)
            self.entropy.truncate(lengths)
        self.starts.truncate(lengths)
        for lists in (self.patch_starts, self.rule_starts):
            for starts, length in zip(lists, lengths, strict=True):
                del starts[bisect_right(starts, length) :]
        self._note_needed()

    def _select(self, rows: Sequence[int]) -> None:
        super()._select(rows)
        if self.patcher is not None:
            self.patcher._select(rows)
        self.starts.select(rows)
        self.patch_starts, self.rule_starts = (
            [[0] if r < 0 else list(old[r]) for r in rows] for old in (self.patch_starts, self.rule_starts)
        )
