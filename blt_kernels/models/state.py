"""States: what a model has to remember of rows to go on with them, byte by byte or many bytes at a time.

A state belongs to a model. `ByteModel.extend` appends ids to its rows and returns their logits, which are those of one
forward over the whole rows. Every layer keeps its keys and values within its window, and `undo` more, so that a few
bytes can be taken back. The ids of the rows are kept whole: to take back more, a row is computed anew from its ids.
"""

from __future__ import annotations

import copy
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.ids import NEWLINE
from blt_kernels.nn import embed_ids, rotary_table, run_layers
from blt_kernels.nn.cache import CachedKeys, KeyCache, RowBuffer, numbers, runs

_PART = 4096  # ids of each row that a long text is read by


class DocumentStarts:
    """Notes where attention starts anew in each row: after `eos_id`, and at `newline`.

    Parameters
    ----------
    rows : int
    eos_id, newline : int, optional
        Ids; None where such an id starts no document.
    """

    def __init__(self, rows: int, eos_id: int | None, newline: int | None) -> None:
        self.ids = {eos_id: 1, newline: 0}  # by id: what lies between it and the start
        self.ids.pop(None, None)
        self.found: list[list[tuple[int, int]]] = [[] for _ in range(rows)]  # positions of an id and of its start

    def extend(self, ids: Tensor, old: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Return the starts in each row: of the document of the first new id, and the later ones."""
        if not self.ids:
            return [[0]] * len(old)
        values, at, starts = ids.tolist(), 0, []
        for found, before, count in zip(self.found, old, counts, strict=True):
            known = [start for _, start in found[-1:]]
            new = [
                (before + i, before + i + self.ids[x]) for i, x in enumerate(values[at : at + count]) if x in self.ids
            ]
            found += new
            at += count
            starts.append(sorted({*(known or [0]), *(start for _, start in new)}))
        return starts

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what the ids from position ``lengths[r]`` on have started."""
        for found, length in zip(self.found, lengths, strict=True):
            del found[bisect_left(found, (length,)) :]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; -1 is an empty one."""
        self.found = [list(self.found[r]) if r >= 0 else [] for r in rows]


class ByteState:
    """Holds what a model remembers of rows. `ByteModel.new_state` makes it, `ByteModel.extend` appends ids to the rows.

    A deep copy goes on by itself, with the same model. One thread at a time may use a state.

    Parameters
    ----------
    model : ByteModel
    rows, undo : int
        As in `ByteModel.new_state`.

    Attributes
    ----------
    model : ByteModel
    lengths : list of int
        The ids that each row has.
    passes : Counter
        How often each part of the model has run, by its name.

    Raises
    ------
    TypeError, ValueError
        `rows` or `undo` is no such int.

    Examples
    --------
    >>> model = ByteLM.bundled()
    >>> state = model.new_state()
    >>> model.extend(to_ids("The quick brown fix"), state=state).shape
    torch.Size([19, 260])
    >>> state.truncate([17])  # without "ix"
    >>> logits = model.extend(to_ids("ox"), state=state)
    >>> torch.allclose(logits[-1], model(to_ids("The quick brown fox"))[-1], atol=1e-3)
    True
    >>> state.select([0, 0, -1])  # the row goes on in two ways, and a new one joins
    >>> logits = model.extend(*to_ids([" jumps", "", "A"]), state=state)
    >>> state.lengths, to_bytes(state.row_ids(1))
    ([25, 19, 1], b'The quick brown fox')
    """

    def __init__(self, model: Any, rows: int, undo: int) -> None:
        _checks.check_int("rows", rows, 0)
        _checks.check_int("undo", undo, 0)
        weight = model.lm_head.weight
        self.model, self.undo, self.dtype, self.device = model, undo, weight.dtype, weight.device
        self.ids = RowBuffer(rows, [()], None, dtype=torch.int32, device=self.device)
        self.passes: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.ids.end)

    @property
    def lengths(self) -> list[int]:
        """The number of ids in each row."""
        return list(self.ids.end)

    @property
    def num_patches(self) -> list[int]:
        """The patches of each row that have passed the global transformer; 0 for a model without any."""
        return [0] * self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all tensors.

        Layers with a window keep it and `undo` more of each row, the others everything. A row has as much memory as
        the longest one.
        """
        return sum(buffer.nbytes for buffer in self._buffers())

    def row_ids(self, row: int) -> Tensor:
        """Return the ids of a row.

        Parameters
        ----------
        row : int

        Returns
        -------
        int64 ``[lengths[row]]``

        Raises
        ------
        TypeError, ValueError
            There is no such row.
        """
        _checks.check_int("row", row, 0)
        if row >= self.rows:
            raise ValueError(f"row: expected 0 to {self.rows - 1}, got {row}")
        return self.ids.flat[0].view(self.rows, self.ids.capacity)[row, : self.ids.end[row]].long()

    @torch.no_grad()
    def truncate(self, lengths: Sequence[int]) -> None:
        """Shorten rows to their first ``lengths[r]`` ids, as if the others had never been there.

        Up to `undo` ids of a row are taken back at no cost; for more, it is computed anew.

        Parameters
        ----------
        lengths : sequence of int
            One a row, from 0 to what it has.

        Raises
        ------
        TypeError, ValueError
            There are not as many lengths as rows, or one is no length of its row.
        """
        lengths = _ints("lengths", lengths)
        if len(lengths) != self.rows:
            raise ValueError(f"lengths: expected one for each of {self.rows} rows, got {len(lengths)}")
        for r, (new, old) in enumerate(zip(lengths, self.ids.end, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"lengths: expected 0 to {old} for row {r}, got {new}")
        anew = [0 if held else n for n, held in zip(lengths, self._holds(lengths), strict=True)]
        (ids,) = self.ids.read([0] * self.rows, anew) if any(anew) else (None,)
        self._truncate([0 if n else length for n, length in zip(anew, lengths, strict=True)])
        if ids is not None:
            self.extend(ids.long(), anew)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows of these numbers, in this order.

        Parameters
        ----------
        rows : sequence of int
            A row may be there several times; -1 is a new, empty row.

        Raises
        ------
        TypeError, ValueError
            There is no such row.
        """
        rows = _ints("rows", rows)
        wrong = [r for r in rows if not -1 <= r < self.rows]
        if wrong:
            raise ValueError(f"rows: expected -1 to {self.rows - 1}, got {wrong[0]}")
        self._select(rows)

    def extend(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """Append ids to the rows. `ByteModel.extend` checks its arguments, and calls this.

        Parameters
        ----------
        ids : int32 or int64 ``[T]``
            Packed.
        counts : sequence of int
            How many of them each row gets.

        Returns
        -------
        ``[T, vocab_size]``
            Their logits.

        Raises
        ------
        NotImplementedError
            The class is that of no model.
        """
        raise NotImplementedError

    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Append the ids of a text to each row, a part at a time, so that memory does not grow with their length.

        Parameters
        ----------
        texts : sequence of sequence of int
            One for each row, of an id at least.

        Returns
        -------
        ``[rows, vocab_size]``
            The logits of the last ids.
        """
        last: dict[int, Tensor] = {}
        for begin in range(0, max(map(len, texts)), _PART):
            parts = [text[begin : begin + _PART] for text in texts]
            counts = list(map(len, parts))
            logits = self.extend(torch.tensor([x for part in parts for x in part], device=self.device), counts)
            for r, (text, count, end) in enumerate(zip(texts, counts, accumulate(counts), strict=True)):
                if count and begin + count == len(text):
                    last[r] = logits[end - 1].clone()
        return torch.stack([last[r] for r in range(len(texts))])

    def draft(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """Do as `extend` does, but without the global transformer: bytes read the patches that are there.

        The logits are a guess. Take the bytes back by `truncate` before the state goes on.

        Parameters
        ----------
        ids : int32 or int64 ``[T]``
            Packed.
        counts : sequence of int
            How many of them each row gets. One that gets any has read some bytes before.

        Returns
        -------
        ``[T, vocab_size]``

        Raises
        ------
        NotImplementedError
            The model has no global transformer.
        """
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> ByteState:
        """Return a copy of the rows, for the same model."""
        memo.setdefault(id(self.model), self.model)
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return other

    def _buffers(self) -> list[RowBuffer]:
        return [self.ids]

    def _holds(self, lengths: Sequence[int]) -> list[bool]:
        """Return for each row whether everything is still there to go on after its first ``lengths[r]`` ids."""
        raise NotImplementedError

    def _truncate(self, lengths: Sequence[int]) -> None:
        self.ids.truncate(lengths)

    def _select(self, rows: Sequence[int]) -> None:
        for buffer in self._buffers():
            buffer.select(rows)

    def _append(self, ids: Tensor, counts: Sequence[int]) -> tuple[list[int], Tensor]:
        """Append ids; return the lengths before, and the positions of the new ids, int64 ``[T]``."""
        old = self.lengths
        self.ids.write(self.ids.append(counts), ids)
        return old, runs(old, counts, self.device)

    def _tail(self, old: Sequence[int], begin: Sequence[int]) -> tuple[Tensor, Documents, Tensor]:
        """Return the ids of each row from position ``begin[r]`` on, their offsets, and where the new ones are."""
        (ids,) = self.ids.read(begin, self.ids.end)
        offsets = [0, *accumulate(end - b for b, end in zip(begin, self.ids.end, strict=True))]
        total = offsets[-1]
        documents = Documents(numbers(offsets, torch.int32, self.device), total, total, self.model.config.vocab_size)
        counts = [end - n for n, end in zip(old, self.ids.end, strict=True)]
        new = runs([end - n for end, n in zip(offsets[1:], counts, strict=True)], counts, self.device)
        return ids, documents, new


def _ints(name: str, values: Iterable[Any]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name}: expected a sequence of ints, got {values!r}") from None


def byte_lm_logits(model: Any, ids: Tensor, positions: Tensor, keys: Sequence[CachedKeys]) -> Tensor:
    """Return the logits of new ids of a `ByteLM`; `keys` are those of each layer."""
    x = embed_ids(model.embed_tokens, ids, None)
    table = rotary_table(positions, model.config, x.dtype)
    return run_layers(model.layers, x, table, list(keys), head=(model.norm, model.lm_head))


class ByteLMState(ByteState):
    """Holds the state of a `ByteLM`: keys and values within the window."""

    part = "byte_lm"  # its name in `passes`

    def __init__(self, model: Any, rows: int, undo: int, *, reset_at_newlines: bool | None = None) -> None:
        super().__init__(model, rows, undo)
        config = model.config
        reset = config.reset_at_newlines if reset_at_newlines is None else reset_at_newlines
        self.cache = KeyCache(rows, config, undo, dtype=self.dtype, device=self.device)
        self.starts = DocumentStarts(
            rows, config.eos_id if config.split_documents else None, NEWLINE if reset else None
        )

    def extend(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        model = self.model
        old, positions = self._append(ids, counts)
        self.passes[self.part] += 1
        starts = self.starts.extend(ids, old, counts)
        logits = byte_lm_logits(model, ids, positions, self.cache.extend(model.ops, counts, starts))
        self.cache.trim()
        return logits

    def _buffers(self) -> list[RowBuffer]:
        return [*super()._buffers(), self.cache]

    def _holds(self, lengths: Sequence[int]) -> list[bool]:
        return self.cache.holds_windows(lengths)

    def _truncate(self, lengths: Sequence[int]) -> None:
        super()._truncate(lengths)
        self.cache.truncate(lengths)
        self.starts.truncate(lengths)

    def _select(self, rows: Sequence[int]) -> None:
        super()._select(rows)
        self.starts.select(rows)
