"""BLT is the byte latent transformer (arXiv 2412.09871): bytes to patches, a transformer over patches, bytes again."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.ids import BPE, ids_of
from blt_kernels.layout import PatchLayout
from blt_kernels.models.base import ByteModel, check_targets
from blt_kernels.models.blt_layers import GlobalTransformer, LocalDecoder, LocalEncoder
from blt_kernels.models.blt_state import BLTState
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.characters import patches_of_whole_characters
from blt_kernels.models.checkpoint import open_blt, open_byte_lm, write_blt
from blt_kernels.models.config import BLTConfig
from blt_kernels.nn import attention_documents, embedding, layer_ranges, linear, load_ops, rotary_table, row_positions
from blt_kernels.ops._patch_layout import check_layout


class BLT(ByteModel):
    """Computes the byte latent transformer.

    Parameters
    ----------
    config : BLTConfig
    ops : "fused" or "reference"
        The public ops, or their plain PyTorch specification.

    Notes
    -----
    Parameters are named as in transformers' ``BltForCausalLM``, without its prefix ``model.``. The patcher is part of
    the model and of its files, and is not trained.

    Raises
    ------
    ValueError
        `ops` is neither.

    Examples
    --------
    >>> model = BLT(BLTConfig.small())
    >>> ids, cu_seqlens = to_ids(["a text", "and one more"])
    >>> model(ids, cu_seqlens).shape, model.patch(ids, cu_seqlens).num_documents
    (torch.Size([18, 260]), 2)
    """

    config_class = BLTConfig

    def __init__(self, config: BLTConfig, ops: str = "fused") -> None:
        super().__init__()
        self.config, self.ops = config, load_ops(ops)
        tables = config.num_functions * len(config.ngram_sizes)
        # A sum of random table rows as large as byte embeddings would hide the byte until each row has been trained.
        self.encoder_hash_tok_embedding = embedding(tables * config.ngram_vocab, config.encoder.dim, std=0.02)
        self.local_encoder = LocalEncoder(config, self.ops)
        self.global_transformer = GlobalTransformer(config, self.ops)
        self.local_decoder = LocalDecoder(config, self.ops)
        self.lm_head = linear(config.decoder.dim, config.vocab_size)
        self.patcher = None if config.patcher is None else ByteLM(config.patcher, ops).requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        ops: str = "fused",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        patcher: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        **changes: Any,
    ) -> BLT:
        """Read a checkpoint of transformers or of facebookresearch/blt: `blt_kernels.models.checkpoint` says how.

        Parameters
        ----------
        path : str or PathLike
            A directory, or a repository on the hub: ``owner/name``, or ``owner/name/folder``.
        ops : "fused" or "reference"
        dtype : torch.dtype, optional
            The stored dtypes if None: then the weights of a CPU model are the mapped file.
        device : torch.device or str
        patcher : str or PathLike, optional
            Another entropy model, as `path`. If None, that of the checkpoint: in transformers' format, the one inside;
            in those of facebookresearch/blt, ``entropy_model`` in the directory or beside it, if it is there.
        revision : str, optional
            Of the repository.
        changes
            Fields of `BLTConfig` that shall differ from the file's, such as ``split_documents=True``.

        Returns
        -------
        BLT

        Raises
        ------
        ImportError
            safetensors or, for the hub, huggingface_hub is not installed.
        FileNotFoundError
            There is no such directory or repository, or a file is not in it.
        OSError
            A file cannot be read, or the hub does not answer (ConnectionError) or gives no access (PermissionError).
        ValueError
            A file is damaged, holds another model or asks for what BLT lacks, weights are missing, unknown or of the
            wrong shape or dtype, or the repository has no such revision; the message names the file and them.
        """
        stored = open_blt(path, revision)
        model = stored.load(cls, ops, dtype, device, **changes)
        other = stored.patcher() if patcher is None else open_byte_lm(patcher, revision)
        if other is not None:
            model.patcher = other.load(ByteLM, ops, dtype, device).requires_grad_(False)
            model.config = replace(model.config, patcher=model.patcher.config)
        return model

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a directory that transformers' ``BltForCausalLM.from_pretrained`` reads, and `from_pretrained` too.

        Tied weights are written under each of their names. transformers knows no documents: with `split_documents`,
        which only `from_pretrained` reads back, its logits differ in rows that hold an EOS before their end.

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
        write_blt(self, self.config, path)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | Documents | None = None,
        *,
        layout: PatchLayout | None = None,
        max_patches: int | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the next byte, or with `targets` their nats.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
            Ids: byte + 4.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        layout : PatchLayout, optional
            Patches of these rows; those of `patch` if None.
        max_patches : int, optional
            As in `patch`.
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
        if layout is None:
            layout = self.patch(ids, rows, max_patches=max_patches)
        check_layout(layout, "tokens", ids)
        if (layout.num_bytes, layout.num_documents) != (rows.total, rows.offsets.shape[0] - 1):
            shape = f"{rows.total} bytes in {rows.offsets.shape[0] - 1} rows"
            raise ValueError(f"layout: expected {shape}, got {layout.num_bytes} in {layout.num_documents}")
        config, encoder, offsets = self.config, self.local_encoder, self.ops.offsets
        patch_rows = _checks.check_documents("layout.cu_patches", layout.cu_patches, layout.capacity, device=ids.device)
        byte_documents, patch_documents = self._documents(ids, rows, patch_rows, layout)
        documents = offsets(byte_documents)

        x = self.ops.ngram_hash_embed(
            ids,
            self.encoder_hash_tok_embedding.weight,
            encoder.embed_tokens.weight,
            offsets(rows),
            ngram_sizes=config.ngram_sizes,
            num_functions=config.num_functions,
        )
        positions = row_positions(rows, ids.shape[0])
        ranges = layer_ranges(self.ops, x, byte_documents, config.encoder.window)
        byte_table = rotary_table(positions, config.encoder, x.dtype)
        x, patches = encoder(x, byte_table, documents, layout, ranges)
        table = rotary_table(row_positions(patch_rows, layout.capacity), config.global_transformer, x.dtype)
        global_ranges = layer_ranges(self.ops, patches, patch_documents, config.global_transformer.window)
        patches = self.global_transformer(patches, table, offsets(patch_documents), global_ranges)
        if config.decoder.window != config.encoder.window:
            ranges = layer_ranges(self.ops, x, byte_documents, config.decoder.window)
        if config.decoder.rotations != config.encoder.rotations:
            byte_table = rotary_table(positions, config.decoder, x.dtype)
        x = self.local_decoder(x, patches, byte_table, documents, layout, ranges)
        return self._head(x, tokens, targets)

    @torch.no_grad()
    def patch(
        self, tokens: Any, cu_seqlens: Tensor | Documents | None = None, *, max_patches: int | None = None
    ) -> PatchLayout:
        """Return the patches of `tokens` by the scheme of the configuration.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``, or text
            Ids as in `forward`, or whatever `blt_kernels.to_ids` takes: str, bytes, uint8 arrays and tensors, and lists
            of them, each a row. No text if patching is "bpe": it has no delimiters.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            As in `forward`.
        max_patches : int, optional
            Capacity of the layout. If None, it is T, and on the CPU as many as there are patches.

        Returns
        -------
        PatchLayout

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value (ids as in `forward`), or the scheme needs a patcher
            and there is none.
        """
        if self.config.patching == "bpe" and not (isinstance(tokens, Tensor) and tokens.dtype != torch.uint8):
            raise ValueError("tokens: expected ids of `to_ids(..., tokenizer=...)`, since patching is 'bpe', got text")
        tokens, cu_seqlens = ids_of(tokens, cu_seqlens, self.lm_head.weight.device)
        ids, rows = self.pack(tokens, cu_seqlens)
        config, offsets = self.config, self.ops.offsets(rows)
        if config.patching == "entropy":
            if self.patcher is None:
                raise ValueError("layout: expected a PatchLayout, since entropy patching has no patcher; got None")
            _, layout = self.patcher.patch(
                ids,
                rows,
                threshold=config.threshold,
                threshold_add=config.threshold_add,
                monotonic=config.monotonic,
                max_patch_length=config.max_patch_length,
                max_patches=max_patches,
                whole_characters=config.whole_characters,
                reset_at_newlines=config.reset_at_newlines or None,
            )
        else:
            # The later steps may add or drop patches, so the capacity is that of the last one.
            final = config.max_patch_length is None and not config.whole_characters
            capacity = max_patches if final else None
            if config.patching == "space":
                layout = self.ops.space_patch(ids, offsets, max_patches=capacity)
            elif config.patching == "bpe":
                layout = self.ops.delimiter_patch(ids, id=BPE, cu_seqlens=offsets, max_patches=capacity)
            else:
                size = config.patch_size if config.patching == "static" else 1
                layout = self.ops.static_patch(rows.offsets, size=size, num_bytes=ids.shape[0], max_patches=capacity)
            if config.whole_characters:
                layout = patches_of_whole_characters(layout, ids, config.max_patch_length, max_patches, ops=self.ops)
            elif config.max_patch_length is not None:
                ends = (layout.decode_ids == layout.patch_ids).float()  # where the byte to come starts a patch
                layout = self.ops.patch_starts(
                    ends, offsets, threshold=0.5, max_patch_length=config.max_patch_length, max_patches=max_patches
                )
        if max_patches is None and _checks.readable(layout.cu_patches):
            layout = layout.compact()
        return layout

    def new_state(self, rows: int = 1, *, undo: int = 64) -> BLTState:
        return BLTState(self, rows, undo)

    def _documents(
        self, ids: Tensor, rows: Documents, patch_rows: Documents, layout: PatchLayout
    ) -> tuple[Documents, Documents]:
        """Return the documents of bytes and those of patches that attention stays within."""
        if not self.config.split_documents:
            return rows, patch_rows
        ends = ids == self.config.eos_id
        documents = rows._replace(offsets=attention_documents(ends.roll(1), rows.offsets))
        if self.config.global_across_documents:
            return documents, patch_rows
        slot = torch.where(ends, layout.patch_ids, -1) + 1
        counts = torch.zeros(layout.capacity + 1, dtype=torch.int32, device=ids.device)
        patch_ends = counts.index_add(0, slot, ends.int())
        starts = (patch_ends[1:] > 0).roll(1)
        return documents, patch_rows._replace(offsets=attention_documents(starts, patch_rows.offsets))
