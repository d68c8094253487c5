"""`GeneratingModel` is what the models share to generate: states, generation, and quantized copies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.models.generate import Generated, Generation, Stream
from blt_kernels.models.quantized import quantized
from blt_kernels.models.state import ByteState

Model = TypeVar("Model", bound="GeneratingModel")


class GeneratingModel(nn.Module):
    """Is the base of `ByteModel`. A subclass stores its configuration as `config`, and defines `new_state`."""

    config: Any
    lm_head: nn.Linear

    def pack(self, tokens: Tensor, cu_seqlens: Tensor | Documents | None) -> tuple[Tensor, Documents]:
        """Check tokens and pack them.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.

        Returns
        -------
        ids : as `tokens` ``[T]``
        rows : Documents
            The offsets of the rows, and what the host knows of them.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value; the message names it. Values are checked in eager
            code on the CPU only, where it costs nothing.
        """
        _checks.check_tensor("tokens", tokens, (1, 2), _checks.INTS)
        ids, rows = _checks.pack("tokens", tokens, cu_seqlens, trailing=0)
        alphabet = self.config.vocab_size
        _checks.check_ids(ids, rows, alphabet, "the alphabet of the model", padded=tokens.dim() == 2)
        known = rows.end is not None and _checks.readable(ids) and not rows.holds_ids_below(alphabet)
        return ids, rows._replace(alphabet=alphabet) if known else rows

    def new_state(self, rows: int = 1, *, undo: int = 64) -> ByteState:
        """Return the state of empty rows, which `extend` appends ids to.

        Parameters
        ----------
        rows : int
        undo : int
            How many bytes of a row `ByteState.truncate` takes back at no cost. Every layer with a window keeps as many
            more.

        Returns
        -------
        ByteState
            In the dtype and on the device that the model has now.

        Raises
        ------
        TypeError, ValueError
            An argument is no such int; or the model is a `BLT` that patches by entropy and has no patcher.

        Examples
        --------
        >>> state = BLT(BLTConfig.small()).new_state(rows=2)
        >>> state.lengths, state.patch_starts
        ([0, 0], [[0], [0]])
        """
        raise NotImplementedError

    @torch.no_grad()
    def extend(self, tokens: Tensor, cu_seqlens: Tensor | None = None, *, state: ByteState) -> Tensor:
        """Append ids to the rows of a state; return the logits that one forward over the whole rows gives them.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[R, S]``
            Ids: byte + 4. Any number for each row.
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        state : ByteState
            Of `new_state`. It is changed.

        Returns
        -------
        ``[*tokens.shape, vocab_size]``
            Without gradients.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype, shape or value, or the state is of another model, or of another
            dtype or device than the model. The message names the argument.

        Notes
        -----
        After any error or interruption, the state is as it was.

        Examples
        --------
        >>> model = MegaByte(MegaByteConfig.small())
        >>> state, ids = model.new_state(), to_ids("The quick brown fox")
        >>> logits = torch.cat([model.extend(part, state=state) for part in ids.split([12, 1, 1, 5])])
        >>> torch.allclose(logits, model(ids), atol=1e-4)
        True
        """
        if not isinstance(state, ByteState) or state.model is not self:
            got = type(state).__name__ if not isinstance(state, ByteState) else "the state of another model"
            raise TypeError(f"state: expected what new_state of this model returned, got {got}")
        weight = self.lm_head.weight
        if (state.dtype, state.device) != (weight.dtype, weight.device):
            expected, got = f"{weight.dtype} on {weight.device}", f"{state.dtype} on {state.device}"
            raise ValueError(f"state: expected one made since the model is in {expected}, got one in {got}")
        ids, rows = self.pack(tokens, cu_seqlens)
        counts = [b - a for a, b in pairwise(rows.offsets.tolist())]
        if len(counts) != state.rows:
            raise ValueError(f"tokens: expected {state.rows} rows as in state, got {len(counts)}")
        if sum(counts) != ids.shape[0]:
            raise ValueError(f"cu_seqlens: expected the last offset to be T = {ids.shape[0]}, got {sum(counts)}")
        before = state.lengths
        try:
            return state.extend(ids, counts).view(*tokens.shape, self.config.vocab_size)
        except BaseException:  # an interruption, too
            state.truncate(before)
            raise

    def generate(
        self,
        prompts: Any,
        *,
        max_new_bytes: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[bytes | str] = (),
        draft: Any = None,
        draft_bytes: int = 8,
        weights: str | None = None,
        captured: bool | None = None,
    ) -> Generated:
        """Write bytes behind prompts.

        Parameters
        ----------
        prompts : str, bytes, ids, or a list of them
            Text (uint8 tensors and arrays, too) gets BOS in front. Ids are an integer tensor or array ``[S]`` or
            ``[R, S]``, or a list of int, and are taken as they are. A prompt of nothing is BOS.
        max_new_bytes : int
            The most ids that a row writes.
        temperature, top_k, top_p, min_p : optional
            As in `blt_kernels.models.sampling.Sampling`; greedy if the temperature is 0.
        seed : int
            Row r draws from a random generator of its own, of ``(seed, r)``.
        stop : sequence of bytes or str
            A row ends when what it has written ends in one of these, and always after EOS. Both are part of the result.
        draft : optional
            Who writes drafts, so that several bytes are checked in one pass of the model: "decoder", the local decoder
            on the patches that there are (BLT-S, arXiv 2605.08044; of a MegaByte the local model); "patcher", the
            entropy model of a BLT, up to where its entropy is above the threshold; "prompt", the text itself, where its
            last bytes have stood before; or another model of the same alphabet, such as a `ByteLM`. No drafts if None.
            Drafts change neither greedy output, but for rounding, nor the distribution of random output.
        draft_bytes : int
            The most bytes of a draft. Every row adapts its own number to what was accepted.
        weights : "bf16" or "int8", optional
            Generate with `quantized` weights; `Statistics.weight_error` says what was rounded. Whoever generates
            often calls `quantized` once instead.
        captured : bool, optional
            Write byte by byte in fixed shapes: on CUDA as captured graphs, with one wait for the device a byte
            (`blt_kernels.models.captured`). The parameters of the model may not move meanwhile. None does so on CUDA
            where there are no drafts, outside of autocast and of `torch.use_deterministic_algorithms`.

        Returns
        -------
        Generated
            New ids, bytes and text of each row, and `Statistics`.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type or value; the message names it. Or a logit is NaN.

        Examples
        --------
        >>> model = ByteLM.from_values({"dim": 32, "num_layers": 1, "num_heads": 2})
        >>> out = model.generate(["one", b"two"], max_new_bytes=20, temperature=0.8, top_p=0.95, draft="prompt")
        >>> len(out.text), out.statistics.bytes <= 40
        (2, True)
        """
        generation = Generation(
            self,
            prompts,
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            draft=draft,
            draft_bytes=draft_bytes,
            weights=weights,
            captured=captured,
        )
        for _ in generation:
            pass
        return generation.result

    def stream(self, prompt: Any, *, text: bool = False, **options: Any) -> Stream:
        """Write bytes behind one prompt, and yield them as they come.

        Parameters
        ----------
        prompt : str, bytes or ids
        text : bool
            Yield str, of whole characters of UTF-8 only.
        options
            As in `generate`; `max_new_bytes` is required.

        Returns
        -------
        Stream
            An iterator of bytes, or of str. Its `result` is what `generate` returns.

        Raises
        ------
        TypeError, ValueError
            As `generate` does; or there is more than one prompt.

        Examples
        --------
        >>> model = ByteLM.from_values({"dim": 32, "num_layers": 1, "num_heads": 2})
        >>> pieces = model.stream("one", max_new_bytes=3)
        >>> b"".join(pieces) == pieces.result.bytes[0]
        True
        """
        generation = Generation(self, prompt, **options)
        if len(generation.prompts) != 1:
            raise ValueError(f"prompt: expected one, got {len(generation.prompts)}")
        return Stream(generation, text)

    def quantized(self: Model, weights: str) -> Model:
        """Return a copy for inference, whose matrices are stored in bf16 or int8, so that a step reads fewer bytes.

        Tables, norms, the output layer and the patcher are shared with this model: patches stay as they are. The
        products are computed in the dtype of the model. The kernels are those of `few_row_linear`: for up to 16 rows of
        fp32 on the CPU. Elsewhere the matrices are converted at every product, which takes longer than without.

        Parameters
        ----------
        weights : "bf16" or "int8"
            int8 has a factor for each row of a matrix.

        Returns
        -------
        ByteModel
            It cannot be trained or saved.

        Raises
        ------
        ValueError
            `weights` is neither, or the model is quantized already.

        Examples
        --------
        >>> model = ByteLM.from_values({"dim": 32, "num_layers": 1, "num_heads": 2})
        >>> out = model.quantized("int8").generate("one", max_new_bytes=4)
        >>> len(out.ids[0]) <= 4, 0 < out.statistics.weight_error < 0.01
        (True, True)
        """
        return quantized(self, weights)
