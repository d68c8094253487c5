"""The entropy model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bytelatent.base_transformer import BaseTransformer
from bytelatent.model.utils import create_causal_mask


class LMTransformer(BaseTransformer):
    def __init__(self, args: Any) -> None:
        super().__init__(args.dim, args.n_layers, args.n_heads, args)
        self.attn_bias_type, self.sliding_window = args.attn_bias_type, args.sliding_window
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, token_values: Tensor) -> Tensor:
        mask = create_causal_mask(
            token_values.shape[1],
            self.attn_impl,
            self.attn_bias_type,
            sliding_window=self.sliding_window,
            tokens=token_values,
            eos_id=self.eos_id,
        )
        return self.output(self.norm(self.run(self.tok_embeddings(token_values), mask)))
