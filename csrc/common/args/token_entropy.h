// Checks the arguments of token_entropy and linear_entropy, for the CPU and for CUDA.
#pragma once

#include <optional>

#include "../check.h"

namespace blt {

inline constexpr int64_t kMaxAlphabet = int64_t{1} << 30;

// Returns logits [rows, alphabet] with unit stride in a row.
inline Tensor check_logits(const Tensor& logits) {
  const Tensor rows = unit_rows(logits, "logits");
  STD_TORCH_CHECK(rows.size(1) >= 1 && rows.size(1) <= kMaxAlphabet, "logits: expected 1 to ", kMaxAlphabet,
                  " columns, got ", rows.size(1));
  return rows;
}

// Returns one value for each of `rows`, contiguous: a gradient that was expanded from a scalar is copied.
inline Tensor check_row_values(const Tensor& values, const char* name, const Tensor& rows) {
  check_shape(values, name, {rows.size(0)});
  check_dtype(values, name, accumulator(rows));
  return as_contiguous(values);
}

// hidden [rows, width], weight [alphabet, width] and bias [alphabet] may have any strides.
inline void check_head(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_dim(hidden, "hidden", 2);
  check_dim(weight, "weight", 2);
  check_dtype(weight, "weight", hidden.scalar_type());
  check_size(weight, "weight", 1, hidden.size(1));
  STD_TORCH_CHECK(weight.size(0) >= 1 && weight.size(0) <= kMaxAlphabet, "weight: expected an alphabet from 1 to ",
                  kMaxAlphabet, ", got ", weight.size(0));
  if (!bias) return;
  check_shape(*bias, "bias", {weight.size(0)});
  check_dtype(*bias, "bias", hidden.scalar_type());
}

}  // namespace blt
