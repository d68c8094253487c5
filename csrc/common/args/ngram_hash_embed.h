// Checks the arguments of ngram_hash and ngram_hash_embed, for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "../check.h"
#include "../hash_primes.h"

namespace blt {

// Holds the constants of x mod divisor by multiplication with a reciprocal of 65 bits, whose top bit is implied
// (Granlund and Montgomery, 1994).
struct Reciprocal {
  uint64_t divisor, reciprocal, wrap;  // wrap is 2^64 mod divisor, or divisor itself
  int bits;                            // is ceil(log2(divisor))
};

inline Reciprocal reciprocal_of(int64_t vocab) {
  STD_TORCH_CHECK(vocab >= 1, "vocab: expected a value >= 1, got ", vocab);
  const uint64_t divisor = static_cast<uint64_t>(vocab);
  const int bits = static_cast<int>(std::bit_width(divisor - 1));
  const unsigned __int128 numerator = static_cast<unsigned __int128>((uint64_t{1} << bits) - divisor) << 64;
  return {divisor, static_cast<uint64_t>(numerator / divisor + 1), ~uint64_t{0} % divisor + 1, bits};
}

// tokens [bytes] and cu_seqlens [documents + 1] are contiguous; without cu_seqlens every document has `length` bytes.
// Table n has n-grams of sizes[n] bytes, hash function functions[n] and vocab[n] rows.
struct HashArguments {
  Tensor tokens;
  std::optional<Tensor> cu_seqlens;
  int64_t documents;
  int32_t length;
  std::vector<int64_t> sizes, functions, vocab;

  int64_t bytes() const { return tokens.size(0); }
  int64_t tables() const { return static_cast<int64_t>(sizes.size()); }
};

// Returns an entry for each of `count` tables, from one for each or one for all.
inline std::vector<int64_t> entries(const std::vector<int64_t>& values, size_t count, const char* name) {
  STD_TORCH_CHECK(values.size() == 1 || values.size() == count, name, ": expected one entry or one for each of ", count,
                  " tables, got ", values.size());
  return values.size() == count ? values : std::vector<int64_t>(count, values[0]);
}

inline HashArguments check_hash(const Tensor& tokens, std::optional<Tensor> cu_seqlens, int64_t num_documents,
                                const std::vector<int64_t>& sizes, const std::optional<std::vector<int64_t>>& functions,
                                const std::vector<int64_t>& vocab) {
  check_dim(tokens, "tokens", 1);
  STD_TORCH_CHECK(tokens.size(0) <= INT32_MAX, "tokens: ", tokens.size(0), " do not fit into int32");
  const int32_t length = cu_seqlens ? 0 : check_even_documents(num_documents, tokens.size(0));
  const int64_t documents = cu_seqlens ? check_num_segments(*cu_seqlens, "cu_seqlens") : num_documents;
  STD_TORCH_CHECK(!sizes.empty(), "ngram_sizes: expected at least one");
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 1, "ngram_sizes: expected values >= 1, got ", size);
  std::vector<int64_t> numbers = entries(functions.value_or(std::vector<int64_t>{0}), sizes.size(), "functions");
  for (const int64_t function : numbers)
    STD_TORCH_CHECK(function >= 0 && function < static_cast<int64_t>(kPrimes.size()), "functions: expected 0 to ",
                    kPrimes.size() - 1, ", got ", function);
  for (const int64_t rows : vocab) STD_TORCH_CHECK(rows >= 1, "vocab: expected values >= 1, got ", rows);
  return {as_contiguous(tokens),
          cu_seqlens,
          documents,
          length,
          sizes,
          std::move(numbers),
          entries(vocab, sizes.size(), "vocab")};
}

// This rank holds those of rows [low, high) of every hashed table that the table has: rows[n] of table n, the first of
// which is row first_rows[n] of a fused tensor. first_rows ends with the rows of all tables.
struct TableShard {
  int64_t low, high;
  std::vector<int64_t> rows, first_rows;

  // `row` is less than the rows of the whole table.
  bool has(uint64_t row) const { return row - static_cast<uint64_t>(low) < static_cast<uint64_t>(high - low); }
  bool has_byte_table() const { return low == 0; }  // only one shard adds it
};

inline TableShard check_shard(const std::optional<std::vector<int64_t>>& row_range, const HashArguments& hash) {
  const std::vector<int64_t>& vocab = hash.vocab;
  const int64_t largest = *std::max_element(vocab.begin(), vocab.end());
  STD_TORCH_CHECK(!row_range || row_range->size() == 2, "row_range: expected 2 entries, got ", row_range->size());
  const int64_t low = row_range ? row_range->front() : 0, high = row_range ? row_range->back() : largest;
  STD_TORCH_CHECK(0 <= low && low < high && high <= largest, "row_range: expected 0 <= lo < hi <= ", largest, ", got ",
                  low, " and ", high);
  TableShard shard = {low, high, {}, {0}};
  shard.rows.reserve(vocab.size()), shard.first_rows.reserve(vocab.size() + 1);
  for (const int64_t whole : vocab) {
    shard.rows.push_back(std::max<int64_t>(std::min(whole, high) - low, 0));
    STD_TORCH_CHECK(shard.rows.back() <= INT64_MAX - shard.first_rows.back(), "vocab: the rows do not fit into int64");
    shard.first_rows.push_back(shard.first_rows.back() + shard.rows.back());
  }
  return shard;
}

// `tables` is one fused tensor or one tensor per table. All rows have unit stride.
struct EmbedArguments {
  HashArguments hash;
  TableShard shard;
  std::vector<Tensor> tables;
  std::optional<Tensor> byte_table;

  int64_t width() const { return tables[0].size(1); }
  // Table n begins at row first_row(n) of this tensor.
  const Tensor& table(int64_t n) const { return tables[tables.size() == 1 ? 0 : n]; }
  int64_t first_row(int64_t n) const { return tables.size() == 1 ? shard.first_rows[n] : 0; }
};

inline EmbedArguments check_embed(const Tensor& tokens, std::vector<Tensor> tables, std::optional<Tensor> byte_table,
                                  const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                  const std::vector<int64_t>& sizes,
                                  const std::optional<std::vector<int64_t>>& functions,
                                  const std::optional<std::vector<int64_t>>& row_range,
                                  const std::optional<std::vector<int64_t>>& vocab) {
  STD_TORCH_CHECK(tables.size() == 1 || tables.size() == sizes.size(), "tables: expected 1 or ", sizes.size(), ", got ",
                  tables.size());
  std::vector<int64_t> rows = vocab.value_or(std::vector<int64_t>{});
  if (!vocab)
    for (const Tensor& table : tables)
      rows.push_back(table.size(0) / (tables.size() == 1 ? std::max<int64_t>(sizes.size(), 1) : 1));
  HashArguments hash = check_hash(tokens, cu_seqlens, num_documents, sizes, functions, rows);
  TableShard shard = check_shard(row_range, hash);
  const bool fused = tables.size() == 1;
  for (size_t n = 0; n < tables.size(); ++n) {
    tables[n] = unit_rows(tables[n], "tables");
    check_dtype(tables[n], "tables", tables[0].scalar_type());
    check_shape(tables[n], "tables", {fused ? shard.first_rows.back() : shard.rows[n], tables[0].size(1)});
  }
  if (byte_table) {
    byte_table = unit_rows(*byte_table, "byte_table");
    check_dtype(*byte_table, "byte_table", tables[0].scalar_type());
    check_size(*byte_table, "byte_table", 1, tables[0].size(1));
  }
  return {std::move(hash), std::move(shard), std::move(tables), std::move(byte_table)};
}

// Describes the gradients of all tables: the hashed ones, then the byte table if it has `alphabet` rows. Each is one
// result, or part of one: those of a fused tensor share a result.
struct TableGradArguments {
  Tensor grad_out;
  HashArguments hash;
  TableShard shard;
  bool fused;
  std::optional<int64_t> alphabet;

  int64_t bytes() const { return hash.bytes(); }
  int64_t width() const { return grad_out.size(1); }
  int64_t tables() const { return hash.tables() + (alphabet ? 1 : 0); }
  int64_t rows(int64_t table) const { return table < hash.tables() ? shard.rows[table] : *alphabet; }
  int64_t result(int64_t table) const { return !fused ? table : table < hash.tables() ? 0 : 1; }
  int64_t results() const { return result(tables() - 1) + 1; }
  int64_t first_row(int64_t table) const { return fused && table < hash.tables() ? shard.first_rows[table] : 0; }
};

inline TableGradArguments check_table_grads(const Tensor& grad_out, const Tensor& tokens,
                                            const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                            const std::vector<int64_t>& sizes,
                                            const std::optional<std::vector<int64_t>>& functions,
                                            const std::optional<std::vector<int64_t>>& row_range,
                                            const std::vector<int64_t>& vocab, bool fused,
                                            std::optional<int64_t> alphabet) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  check_size(rows, "grad_out", 0, tokens.size(0));
  STD_TORCH_CHECK(alphabet.value_or(0) >= 0, "alphabet: expected a value >= 0, got ", alphabet.value_or(0));
  HashArguments hash = check_hash(tokens, cu_seqlens, num_documents, sizes, functions, vocab);
  TableShard shard = check_shard(row_range, hash);
  return {rows, std::move(hash), std::move(shard), fused, alphabet};
}

}  // namespace blt
