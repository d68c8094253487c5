"""PatchLayout: which bytes belong to which patch, for ragged documents packed end to end.

Everything is a tensor on the device of the data, so that no operation reads a value of the device. Shapes depend only
on what the host knows: `T` bytes, `B` documents and a capacity of `C >= P` patches. `P`, the number of patches, is on
the device only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from blt_kernels import _checks, _padded
from blt_kernels._namespace import NAMESPACE


@dataclass(frozen=True, eq=False, repr=False)
class PatchLayout:
    """Holds ragged patches over packed bytes.

    A patch may be empty, anywhere: its two offsets are equal, no byte has its id, and it counts as a patch of its
    document. The patching ops leave empty patches at the end only; `from_ids` keeps those of a padded patch axis. Every
    op takes them: they pool to zeros, as queries without keys they attend to nothing, no byte reads them unless
    `decode_ids` says so, and windows of patches count them.

    Attributes
    ----------
    patch_offsets : int32 ``[C+1]``
        Patch ``p`` is bytes ``[patch_offsets[p], patch_offsets[p+1])``. Beyond ``P`` every offset is the end of the
        last document, so that tail patches are empty.
    cu_patches : int32 ``[B+1]``
        Document ``b`` owns patches ``[cu_patches[b], cu_patches[b+1])``; ``cu_patches[-1]`` is ``P``.
    patch_ids : int32 ``[T]``
        The patch of each byte; -1 for bytes beyond the last document.
    decode_ids : int32 ``[T]``
        The patch whose global output byte ``i`` may read when it predicts byte ``i + 1``: the one before the patch of
        byte ``i + 1``. The byte after a document's last one belongs to a new patch if the boundary decision after the
        last byte says so. -1 where there is none: it reads zeros and sends no gradient.
    decode_offsets : int32 ``[C+1]``
        The first byte of patch ``p``'s document whose decode id is ``p`` or more, or the end of the document if there
        is none; beyond ``P`` the end of the last document. The bytes whose decode id is ``p`` are the first ones of
        ``[decode_offsets[p], decode_offsets[p+1])``. All others there begin the next document and have decode id -1,
        as have all bytes before ``decode_offsets[0]``.
    cu_seqlens : int32 ``[B+1]``
        Document ``b`` is bytes ``[cu_seqlens[b], cu_seqlens[b+1])``.
    overflowed : bool ``[1]``
        True if the capacity was too small: then the surplus bytes stay in the last patch of their document.

    Examples
    --------
    >>> layout = PatchLayout.from_lengths(torch.tensor([[1, 3], [2, 0]])).compact()  # two documents
    >>> layout.patch_offsets.tolist(), layout.cu_patches.tolist(), layout.cu_seqlens.tolist()
    ([0, 1, 4, 6], [0, 2, 3], [0, 4, 6])
    >>> layout.patch_ids.tolist(), layout.decode_ids.tolist()  # no patch precedes patch 2
    ([0, 1, 1, 1, 2, 2], [0, 0, 0, 0, -1, -1])
    """

    patch_offsets: Tensor
    cu_patches: Tensor
    patch_ids: Tensor
    decode_ids: Tensor
    decode_offsets: Tensor
    cu_seqlens: Tensor
    overflowed: Tensor

    @property
    def capacity(self) -> int:
        """C, the number of patches there is room for."""
        return self.patch_offsets.numel() - 1

    @property
    def num_bytes(self) -> int:
        """T, the number of packed bytes."""
        return self.patch_ids.numel()

    @property
    def num_documents(self) -> int:
        """B, the number of documents, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_patches(self) -> Tensor:
        """P as an int32 ``[1]`` tensor on the device of the layout."""
        return self.cu_patches[-1:]

    @property
    def patch_lengths(self) -> Tensor:
        """Length of each patch in bytes, int32 ``[C]``; 0 beyond ``P``."""
        return self.patch_offsets.diff()

    @property
    def device(self) -> torch.device:
        """The device that all tensors of the layout are on."""
        return self.patch_offsets.device

    def to(self, device: torch.device | str) -> PatchLayout:
        """Move the layout.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        PatchLayout
            Every tensor is on `device`.

        Raises
        ------
        TypeError, ValueError
            `device` names no device of this torch.
        """
        _checks.check_device("device", device)
        return PatchLayout(*(getattr(self, f.name).to(device) for f in fields(self)))

    def compact(self) -> PatchLayout:
        """Trim the capacity to the number of patches: C becomes P.

        This is the one explicit synchronisation of the library. On the CPU it costs nothing; on a GPU it waits for the
        layout.
        """
        for name in ("cu_patches", "patch_offsets", "decode_offsets"):
            _checks.check_tensor(name, getattr(self, name), 1, (torch.int32,))
        size = int(self.cu_patches[-1]) + 1
        return replace(self, patch_offsets=self.patch_offsets[:size], decode_offsets=self.decode_offsets[:size])

    def to_lengths(self, include_next_byte: bool = False, padding: int = 0, width: int | None = None) -> Tensor:
        """Convert to the padded patch lengths of other code bases. Empty patches at the end of a document are left out.

        Parameters
        ----------
        include_next_byte
            Count the byte to come after each document as well, as facebookresearch/blt does: a row then sums to the
            length of its document plus one, and ends in a patch of length 1 that owns no byte yet if the boundary
            decision after the last byte was a start.
        padding
            0, or -1 for the lengths of transformers' BLT. There a row sums to the length of its document S. If the
            decision after the last byte was a start, that start is a patch of length 0 at S. A row of fewer starts than
            others is closed by starts at S + 1: its last patch counts the byte to come, then come zeros and a -1.
        width
            Pmax. Starts for which a row has no room are left out: its last patch takes their bytes. If None, it is that
            of the longest row, for which the host waits for the device; with a width it does not.

        Returns
        -------
        int64 ``[B, Pmax]``
            One row a document, padded on the right.

        Raises
        ------
        ValueError
            `padding` is neither 0 nor -1, or -1 together with `include_next_byte`, or `width` is below 1.
        """
        _checks.check_bool("include_next_byte", include_next_byte)
        _padded.check_padding(padding, (0, -1))
        if padding and include_next_byte:
            raise ValueError("include_next_byte: expected False with padding = -1, got True")
        if width is not None:
            _checks.check_int("width", width, 1)
        documents, first = self.cu_seqlens.long(), self.cu_patches[:-1].long()
        size, counts = documents.diff(), torch.zeros_like(first)
        opens = size == 0  # whether the byte to come starts a patch
        if self.num_bytes:
            last = (documents[1:] - 1).clamp(min=0)
            counts = torch.where(opens, 0, self.patch_ids[last] + 1 - first)
            opens = opens | (self.decode_ids[last] == self.patch_ids[last])
        if include_next_byte or padding:
            counts = counts + opens
        if width is None:
            width = int(counts.max()) if counts.numel() else 0
        column = torch.arange(width + 1, device=self.device)
        patches = (first[:, None] + column).clamp(max=self.capacity)
        starts = torch.minimum(self.patch_offsets[patches], documents[1:, None]) - documents[:-1, None]
        if include_next_byte or padding:
            starts = starts + (column >= counts[:, None])  # the last ones close the row, after the byte to come
        return torch.cat([starts[:, :-1], (size + include_next_byte)[:, None]], 1).diff()

    @staticmethod
    def from_lengths(
        lengths: Tensor, seq_len: int | None = None, padding: int | None = None, max_patches: int | None = None
    ) -> PatchLayout:
        """Build a layout from padded patch lengths.

        The host waits for the device, to check them, unless `seq_len` and `max_patches` are given.

        Parameters
        ----------
        lengths : integer ``[B, Pmax]``
            One row a document; zeros are ignored. Row ``b`` sums to the length of its document.
        seq_len
            If given, every document has this many bytes, and a row sums to `seq_len`, or to ``seq_len + 1`` where it
            counts the byte to come. Then a last patch of length 1 is the decision that this byte starts a patch.
            Where a row does not say, the byte to come is taken to continue the last patch.
        padding
            -1 for the lengths of transformers' BLT, which `to_lengths` describes: a row sums to the length of its
            document, the -1 counted, and a patch of length 0 at its end is the decision that the byte to come starts a
            patch. 0 for the others. If None, it is -1 where `lengths` has one: a batch of transformers whose rows all
            have as many starts holds none.
        max_patches
            The capacity C, at least B; one for each of the lengths if None. Given with `seq_len`, values are not
            checked, so that nothing waits and the function compiles: negative lengths count as 0, starts beyond the end
            of a row do not exist, and the last patch of a row has all bytes that its lengths leave.

        Returns
        -------
        PatchLayout

        Raises
        ------
        TypeError
            `lengths` is not an integer tensor.
        ValueError
            `lengths` is not two-dimensional, has a negative entry where `padding` has none, a row does not sum to what
            `seq_len` asks for, there are more bytes than an int32 counts, or fewer patches than rows.
        """
        _padded.check_lengths(lengths, seq_len, padding, max_patches)
        boundaries, cu_seqlens = _padded.boundaries_of_lengths(lengths, seq_len, padding)
        capacity = max(lengths.numel(), lengths.shape[0]) if max_patches is None else max_patches
        # `ops.boundary_patch` defines the operator, and imports this module.
        operator = getattr(torch.ops, NAMESPACE).boundary_patch_fwd
        outputs = operator(boundaries, cu_seqlens, 0, None, None, "end", None, capacity)
        patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, overflowed, _ = outputs
        return PatchLayout(patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, cu_seqlens, overflowed)

    @staticmethod
    def from_ids(patch_ids: Tensor, decode_ids: Tensor, slots: int) -> PatchLayout:
        """Build a layout with a padded patch axis from the patches of bytes, without synchronising.

        Every row is a document of S bytes and owns `slots` patches, so that what ops take and return for patches,
        ``[C, D]``, is a view of ``[B, slots, D]``. Slot p of row b is patch ``b * slots + p``. A slot that no byte has
        is an empty patch.

        Parameters
        ----------
        patch_ids : integer ``[B, S]``
            The slot of each byte in its row, from 0 to ``slots - 1``; ids never fall along a row.
        decode_ids : integer ``[B, S]``
            The slot whose global output each byte reads, or -1 for none; ids never fall along a row.
        slots : int
            Patches in a row, at least 1.

        Returns
        -------
        PatchLayout
            Of capacity ``B * slots``. `cu_patches` is ``[0, slots, 2 * slots, ...]``: empty slots count as patches.
            Values are not checked, but never lead out of bounds: an id beyond its range becomes the nearest one in it,
            and an id below an earlier one of its row becomes that one. `overflowed` is true if a patch id was `slots`
            or more.

        Raises
        ------
        TypeError
            The ids are not integer tensors.
        ValueError
            The ids are not ``[B, S]``, differ in shape, `slots` is below 1, or there are more bytes or slots than an
            int32 counts.

        Examples
        --------
        >>> ids, decode_ids = torch.tensor([[0, 1, 1], [0, 2, 2]]), torch.tensor([[0, 0, 0], [-1, 0, 2]])
        >>> layout = PatchLayout.from_ids(ids, decode_ids, slots=3)
        >>> layout.patch_offsets.tolist(), layout.cu_patches.tolist()  # patches 2 and 4 are empty
        ([0, 1, 3, 3, 4, 4, 6], [0, 3, 6])
        >>> layout.patch_ids.tolist(), layout.decode_ids.tolist()
        ([0, 1, 1, 3, 5, 5], [0, 0, 0, -1, 3, 5])
        """
        _padded.check_ids(patch_ids, decode_ids, slots)
        rows, size = patch_ids.shape
        row = torch.arange(rows + 1, dtype=torch.int32, device=patch_ids.device)
        packed, patch_offsets = _padded.packed_ids(patch_ids, 0, slots)
        readers, decode_offsets = _padded.packed_ids(decode_ids, -1, slots)
        overflowed = (patch_ids >= slots).any()[None]
        return PatchLayout(patch_offsets, row * slots, packed, readers, decode_offsets, row * size, overflowed)

    @staticmethod
    def from_cuts(cuts: Tensor, cu_seqlens: Tensor, max_patches: int | None = None) -> PatchLayout:
        """Build a layout from boundary decisions, without synchronising: the specification of every patching op.

        Parameters
        ----------
        cuts : bool ``[T]``
            ``cuts[i]``: the byte after byte ``i`` starts a patch. The first byte of a document always does.
        cu_seqlens : int32 or int64 ``[B+1]``
        max_patches
            The capacity C, at least one for each document that is not empty; T if None. If it is too small, starts are
            dropped from the end of the documents that do not fit, so that every later document that is not empty keeps
            at least one patch.

        Returns
        -------
        PatchLayout

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, device, shape or value; the message names it.
        """
        _checks.check_tensor("cuts", cuts, 1, (torch.bool,))
        num_bytes = cuts.shape[0]
        cu_seqlens = _checks.check_offsets("cu_seqlens", cu_seqlens, num_bytes, device=cuts.device)
        num_documents = cu_seqlens.shape[0] - 1
        if max_patches is not None:  # empty documents need no patch
            occupied = int((cu_seqlens.diff() > 0).sum()) if _checks.readable(cu_seqlens) else 0
            _checks.check_capacity(max_patches, occupied)
        capacity = num_bytes if max_patches is None else max_patches
        position = torch.arange(num_bytes, device=cuts.device)
        cu = cu_seqlens.long()
        document = torch.searchsorted(cu[1:], position, right=True)  # [T], B for bytes beyond the last document
        inside = document < num_documents
        first = torch.nn.functional.pad(cu, (0, 1), value=-1)[document]  # [T], first byte of the byte's document
        previous_boundary = torch.nn.functional.pad(cuts, (1, 0))[:num_bytes]
        starts = inside & ((position == first) | previous_boundary)
        order = torch.nn.functional.pad(starts.cumsum(0), (1, 0))  # [T+1], starts before each byte
        wanted = order[cu].diff()  # [B]
        cu_patches = _allot(wanted, (cu.diff() > 0).long(), capacity)

        if num_documents:
            own = document.clamp(max=num_documents - 1)
            rank = order[1:] - 1 - order[cu[:-1]][own]  # [T], the byte's patch within its document
            granted = cu_patches.diff()[own]
            kept = starts & (rank < granted)
            patch_ids = torch.where(inside, cu_patches[own] + torch.minimum(rank, granted - 1), -1)
            last = inside & (position + 1 == cu[own + 1])
            opens = torch.where(last, cuts & (wanted[own] == granted), kept.roll(-1))
            decode_ids = patch_ids - (~opens).long()
            decode_ids = torch.where(inside & (decode_ids >= cu_patches[own]), decode_ids, -1)
        else:
            kept, patch_ids = starts, torch.full_like(position, -1)
            decode_ids, last, opens = patch_ids, kept, kept

        def per_patch(chosen: Tensor, value: Tensor) -> Tensor:
            # One byte of each patch is chosen. The others write to an extra entry, which is cut off.
            entry = torch.where(chosen, patch_ids, capacity + 1)
            return cu[-1].repeat(capacity + 2).scatter(0, entry, value)[: capacity + 1]

        # The last byte of a patch reads it, unless it ends its document and no patch starts after it.
        return PatchLayout(
            per_patch(kept, position).int(),
            cu_patches.int(),
            patch_ids.int(),
            decode_ids.int(),
            per_patch(inside & (last | opens), position + (~opens).long()).int(),
            cu_seqlens.int(),
            (order[cu[-1:]] != cu_patches[-1:]),
        )

    def __repr__(self) -> str:
        head = f"PatchLayout({self.num_documents} documents, {self.num_bytes} bytes"
        tail = f"capacity {self.capacity}, device={str(self.device)!r})"
        if type(self.patch_offsets) is not Tensor or self.device.type != "cpu":
            return f"{head}, {tail}"
        patches, size = int(self.cu_patches[-1]), int(self.cu_seqlens[-1])
        mean = f"{size / patches:.2f}" if patches else "no"
        full = ", overflowed" if bool(self.overflowed) else ""
        return f"{head}, {patches} patches of {mean} bytes on average{full}, {tail}"


def _allot(wanted: Tensor, occupied: Tensor, capacity: int) -> Tensor:
    """Share `capacity` patches among documents. Return their cumulative numbers, int64 ``[B+1]``.

    Document b may fill the patches up to ``capacity - (documents after it that are not empty)``. Hence
    ``cu[b+1] = min(cu[b] + wanted[b], limit[b])``, which unrolls to a running minimum.
    """
    limit = capacity - (occupied.sum() - occupied.cumsum(0))
    total = wanted.cumsum(0)
    granted = total if total.numel() == 0 else total + (limit - total).cummin(0).values.clamp(max=0)
    return torch.nn.functional.pad(granted, (1, 0))


@dataclass(frozen=True, eq=False)
class AttentionRanges:
    """Holds which keys each query attends to, and which queries attend to each key; `attention_ranges` makes it.

    Attributes
    ----------
    intervals : int32 ``[2 (Tq' + Tk')]``
        First and last key of each query, then first and last query of each key: rows of Tq' and Tk' entries, which are
        Tq and Tk rounded up to a multiple of 4.
    num_queries, num_keys : int
        Tq and Tk.
    window : int or None
    causal : bool
        Those that the intervals were made for.

    Examples
    --------
    >>> ranges = attention_ranges(torch.tensor([0, 4]), num_queries=4)
    >>> ranges.num_keys, ranges.causal
    (4, True)
    """

    intervals: Tensor
    num_queries: int
    num_keys: int
    window: int | None
    causal: bool


pytree.register_dataclass(PatchLayout, serialized_type_name=f"{NAMESPACE}.PatchLayout")
pytree.register_pytree_node(
    AttentionRanges,
    lambda ranges: ([ranges.intervals], (ranges.num_queries, ranges.num_keys, ranges.window, ranges.causal)),
    lambda tensors, context: AttentionRanges(*tensors, *context),
    serialized_type_name=f"{NAMESPACE}.AttentionRanges",
)
