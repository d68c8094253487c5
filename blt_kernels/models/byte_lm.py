"""ByteLM is a small causal transformer over bytes. Its next-byte entropies decide where BLT's patches start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.ids import NEWLINE, ids_of
from blt_kernels.layout import PatchLayout
from blt_kernels.models.base import ByteModel, check_targets
from blt_kernels.models.characters import patches_of_whole_characters
from blt_kernels.models.checkpoint import open_byte_lm, write_byte_lm
from blt_kernels.models.config import ByteLMConfig
from blt_kernels.models.state import ByteLMState
from blt_kernels.nn import (
    RMSNorm,
    TransformerLayer,
    attention_documents,
    embed_ids,
    embedding,
    known_ids,
    layer_ranges,
    linear,
    load_ops,
    rotary_table,
    row_positions,
)
from blt_kernels.nn.recompute import fits_block, in_blocks

BUNDLED = Path(__file__).parent.parent / "assets" / "entropy_model.safetensors"


class ByteLM(ByteModel):
    """Computes the entropy model: embedding, transformer layers with a sliding window, output head.

    Parameters
    ----------
    config : ByteLMConfig
    ops : "fused" or "reference"
        The public ops, or their plain PyTorch specification.

    Raises
    ------
    ValueError
        `ops` is neither.

    Examples
    --------
    >>> model = ByteLM.bundled()
    >>> model(to_ids("for i in rang")).softmax(-1)[-1, to_ids("e")].item() > 0.9  # the e of "range"
    True
    """

    config_class = ByteLMConfig

    def __init__(self, config: ByteLMConfig, ops: str = "fused") -> None:
        super().__init__()
        self.config, self.ops = config, load_ops(ops)
        self.embed_tokens = embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerLayer(config, self.ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = linear(config.dim, config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        ops: str = "fused",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **changes: Any,
    ) -> ByteLM:
        """Read the entropy model of a checkpoint: `blt_kernels.models.checkpoint` says how.

        The checkpoint is a BLT of transformers with its patcher, that patcher alone (``BltPatcher``), or an entropy
        model of facebookresearch/blt.

        Parameters
        ----------
        path, ops, dtype, device, revision
            As in `BLT.from_pretrained`.
        changes
            Fields of `ByteLMConfig` that shall differ from the file's.

        Returns
        -------
        ByteLM

        Raises
        ------
        ImportError, OSError, ValueError
            As in `BLT.from_pretrained`.
        """
        return open_byte_lm(path, revision).load(cls, ops, dtype, device, **changes)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a directory that transformers' ``BltPatcher.from_pretrained`` reads, and `from_pretrained` too.

        Tied weights are written under each of their names.

        Parameters
        ----------
        path : str or PathLike

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The directory cannot be written.
        ValueError
            transformers would compute something else; the message names the field of the configuration. Or a parameter
            is on the meta device, or fake.
        """
        write_byte_lm(self, self.config, path)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | Documents | None = None,
        *,
        reset_at_newlines: bool | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the next byte, or with `targets` their nats.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
            Ids: byte + 4.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        reset_at_newlines : bool, optional
            As in the configuration, which decides if None.
        targets : int64, as `tokens`, optional
            Ids that are predicted, such as those of `blt_kernels.nn.next_byte_targets`; -100 is none.

        Returns
        -------
        ``[*tokens.shape, vocab_size]``
            0 for tokens beyond the last row, which may hold any value and get no gradient. With `targets`, their nats,
            ``-ln p``, in fp32 (fp64 for an fp64 model) ``tokens.shape``, 0 where there is none: logits are not stored.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value; the message names it. An id outside the alphabet is
            an error in eager code on the CPU, where the check costs nothing; elsewhere it has no embedding.
        """
        ids, rows = self.pack(tokens, cu_seqlens)
        check_targets(targets, tokens)
        return self._head(self.norm(self._states(ids, rows, reset_at_newlines)), tokens, targets)

    def _states(self, ids: Tensor, rows: Documents, reset_at_newlines: bool | None) -> Tensor:
        """Return packed bytes ``[T, D]`` after the layers."""
        if reset_at_newlines is None:
            reset_at_newlines = self.config.reset_at_newlines
        _checks.check_bool("reset_at_newlines", reset_at_newlines)
        documents = rows
        if self.config.split_documents or reset_at_newlines:
            ends = ids == self.config.eos_id
            starts = ends.roll(1) if self.config.split_documents else torch.zeros_like(ends)
            starts = starts | (ids == NEWLINE) if reset_at_newlines else starts
            documents = rows._replace(offsets=attention_documents(starts, rows.offsets))
        x = embed_ids(self.embed_tokens, ids, known_ids(ids, rows, self.config.vocab_size))
        table = rotary_table(row_positions(rows, ids.shape[0]), self.config, x.dtype)
        ranges = layer_ranges(self.ops, x, documents, self.config.window)
        offsets = self.ops.offsets(documents)
        for layer in self.layers:
            x = layer(x, table, offsets, ranges)
        return x

    def new_state(self, rows: int = 1, *, undo: int = 64) -> ByteLMState:
        return ByteLMState(self, rows, undo)

    def patch(
        self,
        tokens: Any,
        cu_seqlens: Tensor | Documents | None = None,
        *,
        threshold: float | None = None,
        threshold_add: float | None = None,
        monotonic: bool = False,
        max_patch_length: int | None = None,
        max_patches: int | None = None,
        whole_characters: bool = False,
        reset_at_newlines: bool | None = None,
    ) -> tuple[Tensor, PatchLayout]:
        """Return entropies and patches of `tokens`: `blt_kernels.entropy_patch` of the logits.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``, or text
            Ids as in `forward`, or whatever `blt_kernels.to_ids` takes: str, bytes, uint8 arrays and tensors, and lists
            of them, each a row.
        cu_seqlens, reset_at_newlines
            As in `forward`.
        threshold : float, optional
            In nats. That of the configuration if None.
        threshold_add, monotonic, max_patch_length, max_patches
            As in `blt_kernels.entropy_patch`.
        whole_characters : bool
            No patch but the first cuts a character: `blt_kernels.models.characters` has the rule.

        Returns
        -------
        entropy : fp32 (fp64 for an fp64 model) ``tokens.shape``
            In nats.
        layout : PatchLayout

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value; the message names it.
        """
        _checks.check_bool("whole_characters", whole_characters)
        tokens, cu_seqlens = ids_of(tokens, cu_seqlens, self.lm_head.weight.device)
        ids, rows = self.pack(tokens, cu_seqlens)
        rules: dict[str, Any] = {
            "threshold": self.config.threshold if threshold is None else threshold,
            "threshold_add": threshold_add,
            "monotonic": monotonic,
            "max_patch_length": None if whole_characters else max_patch_length,
            "max_patches": None if whole_characters else max_patches,
        }
        offsets = self.ops.offsets(rows)
        if fits_block(ids):
            logits = self(ids, rows, reset_at_newlines=reset_at_newlines)
            entropy, layout = self.ops.entropy_patch(logits, offsets, **rules)
        else:  # logits are held in blocks only
            states = self._states(ids, rows, reset_at_newlines)
            entropy = in_blocks(lambda x: self.ops.token_entropy(self.lm_head(self.norm(x))), states)
            if not rows.full:
                entropy = entropy.where(torch.arange(ids.shape[0]) < rows.offsets[-1], 0)
            layout = self.ops.patch_starts(entropy, offsets, **rules)
        if whole_characters:
            layout = patches_of_whole_characters(layout, ids, max_patch_length, max_patches, ops=self.ops)
        return entropy.view(tokens.shape), layout

    @classmethod
    def bundled(cls, ops: str = "fused", *, device: torch.device | str = "cpu") -> ByteLM:
        """Return the entropy model that ships with the package, in fp32; ``assets/README.md`` is its card.

        Parameters
        ----------
        ops : "fused" or "reference"
        device : torch.device or str

        Returns
        -------
        ByteLM

        Raises
        ------
        ImportError
            safetensors is not installed.
        """
        return cls.load(BUNDLED, ops, dtype=torch.float32, device=device)
