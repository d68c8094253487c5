"""Keeps the part of a file that is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from blt_kernels.cli.patch.stream import Piece


@dataclass
class Window:
    """Bytes ``[start, start + length)`` of a stream and the whole patches that they belong to.

    Patch ``first_patch + k`` of the stream is bytes ``[bounds[k], bounds[k+1])``.
    """

    start: int
    length: int
    data: bytes = b""
    entropy: list[float] | None = None
    first_patch: int = -1
    bounds: list[int] = field(default_factory=list)
    _pieces: list[bytes] = field(default_factory=list)
    _size: int = 0
    _closed: bool = False

    @property
    def stop(self) -> int:
        """The offset after the last byte."""
        return min(self.start + self.length, (1 << 63) - 1)  # int64 offsets end here

    def add(self, piece: Piece) -> None:
        """Keep the bytes of a piece that are in the window."""
        self._size += len(piece.data)
        if self._closed:
            return
        cut_from, cut_to = (min(max(at - piece.offset, 0), len(piece.data)) for at in (self.start, self.stop))
        self._pieces.append(piece.data[cut_from:cut_to])
        if piece.entropy is not None:
            self.entropy = [] if self.entropy is None else self.entropy
            self.entropy += piece.entropy[cut_from:cut_to].tolist()
        before = piece.starts[piece.starts <= self.start]
        if before.shape[0]:
            self.first_patch += before.shape[0]
            self.bounds = [int(before[-1])]
        self.bounds += piece.starts[(piece.starts > self.start) & (piece.starts < self.stop)].tolist()
        beyond = piece.starts[piece.starts >= max(self.stop, self.start + 1)]
        if beyond.shape[0]:
            self._close(int(beyond[0]))

    def finish(self) -> None:
        """Close the last patch at the end of the stream, and join the bytes."""
        if not self._closed:
            self._close(self._size)
        self.data, self._pieces = b"".join(self._pieces), []

    def _close(self, end: int) -> None:
        self.bounds.append(end)
        self._closed = True

    def narrow(self, length: int) -> Window:
        """Return the first `length` bytes of the window."""
        if length >= len(self.data):
            return self
        stop = self.start + length
        kept = sum(bound < stop for bound in self.bounds[:-1]) + 1
        entropy = None if self.entropy is None else self.entropy[:length]
        return Window(self.start, length, self.data[:length], entropy, self.first_patch, self.bounds[:kept])
