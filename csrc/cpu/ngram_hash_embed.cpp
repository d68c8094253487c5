// ngram_hash_embed: the embedding of a byte plus one hashed row for each n-gram that ends at it.
//
//   out[t] = byte_table[token[t]] + sum over tables n of table_n[hash_n(t)],  added up in fp32 and rounded once
//   grad_table_n[row] = sum of grad_out[t] over the bytes t with hash_n(t) = row, in their order
//
// Forward: bytes are spread over the threads; a byte's hashes stay in registers and its rows are added up in L1. Bytes
// moved: N + 1 rows read and one written a byte; with large tables every row is a miss, which sets the speed.
// Backward, a table at a time: hash all bytes again, sort them by row, let one owner add up each row. A dense gradient is
// written once, zeros included. Bytes moved: a row read for each byte and table, and the gradient written.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "ngram_hash.h"
#include "sorted_rows.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int64_t kHashGrain = 2048;  // bytes to hash that a thread must have to be worth waking

Tensor ngram_hash_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                          const std::vector<int64_t>& ngram_sizes, int64_t num_functions, int64_t vocab) {
  const Ngrams ngrams = check_ngrams(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab);
  const Tensor ids = as_contiguous(tokens);
  const int64_t bytes = ids.size(0), tables = ngrams.tables();
  Tensor hashes = new_output(ids, {tables, bytes}, ScalarType::Long);
  int64_t* const out = hashes.mutable_data_ptr<int64_t>();
  dispatch_int(ids.scalar_type(), "tokens", [&](auto tag) {
    using Id = typename decltype(tag)::type;
    const Id* const id = ids.const_data_ptr<Id>();
    parallel_for(bytes, kHashGrain, [&](int64_t begin, int64_t end) {
      for_each_hash(ngrams, id, begin, end, [=](int64_t t, const uint64_t* rows) {
        for (int64_t n = 0; n < tables; ++n) out[n * bytes + t] = static_cast<int64_t>(rows[n]);
      });
    });
  });
  for (int64_t n = 0; n < tables; ++n) std::fill(out + n * bytes + ngrams.end(), out + (n + 1) * bytes, int64_t{0});
  return hashes;
}

// The rows [low, high) of every table that are here to be read.
struct Shard {
  int64_t low, high;
  bool has(uint64_t row) const { return row - static_cast<uint64_t>(low) < static_cast<uint64_t>(high - low); }
  int64_t rows() const { return high - low; }
  bool has_byte_table() const { return low == 0; }  // of all shards, one adds the byte table
};

Shard check_shard(const std::optional<std::vector<int64_t>>& row_range, int64_t vocab) {
  if (!row_range) return {0, vocab};
  STD_TORCH_CHECK(row_range->size() == 2, "row_range: expected 2 entries, got ", row_range->size());
  const int64_t low = row_range->front(), high = row_range->back();
  STD_TORCH_CHECK(0 <= low && low < high && high <= vocab, "row_range: expected 0 <= lo < hi <= ", vocab, ", got ", low,
                  " and ", high);
  return {low, high};
}

// --- forward ----------------------------------------------------------------------------------------------------------

// The first row of every table. A fused tensor holds one table after the other.
template <class T>
std::vector<const T*> table_rows(const std::vector<Tensor>& tables, int64_t count, int64_t rows) {
  std::vector<const T*> first;
  for (int64_t n = 0; n < count; ++n) {
    const bool fused = tables.size() == 1;
    const Tensor& table = tables[fused ? 0 : n];
    first.push_back(table.const_data_ptr<T>() + (fused ? n * rows * table.stride(0) : 0));
  }
  return first;
}

Tensor ngram_hash_embed_fwd_cpu(const Tensor& tokens, std::vector<Tensor> tables, std::optional<Tensor> byte_table,
                                const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                                [[maybe_unused]] const std::string& grad,
                                const std::optional<std::vector<int64_t>>& row_range, int64_t vocab) {
  const Ngrams ngrams = check_ngrams(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab);
  const Shard shard = check_shard(row_range, vocab);
  const int64_t count = ngrams.tables();
  const bool fused = tables.size() == 1;
  STD_TORCH_CHECK(fused || static_cast<int64_t>(tables.size()) == count, "tables: expected 1 or ", count, ", got ",
                  tables.size());
  for (Tensor& table : tables) {
    table = unit_rows(table, "tables");
    check_dtype(table, "tables", tables[0].scalar_type());
    check_size(table, "tables", 0, (fused ? count : 1) * shard.rows());
    check_size(table, "tables", 1, tables[0].size(1));
    check_size(table, "tables", 0, tables[0].size(0));
  }
  const int64_t width = tables[0].size(1), bytes = tokens.size(0);
  if (byte_table) {
    byte_table = unit_rows(*byte_table, "byte_table");
    check_dtype(*byte_table, "byte_table", tables[0].scalar_type());
    check_size(*byte_table, "byte_table", 1, width);
  }
  const Tensor ids = as_contiguous(tokens);
  Tensor out = new_output(tables[0], {bytes, width});
  dispatch_float(out.scalar_type(), "tables", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<const T*> first_rows = table_rows<T>(tables, count, shard.rows());
    const T* const byte_rows = byte_table && shard.has_byte_table() ? byte_table->const_data_ptr<T>() : nullptr;
    const int64_t alphabet = byte_table ? byte_table->size(0) : 0, byte_stride = byte_table ? byte_table->stride(0) : 0;
    T* const to = out.mutable_data_ptr<T>();
    dispatch_int(ids.scalar_type(), "tokens", [&](auto id_tag) {
      using Id = typename decltype(id_tag)::type;
      const Id* const id = ids.const_data_ptr<Id>();
      parallel_for(bytes, row_grain(width * (count + 1)), [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(count + 1);
        for_each_hash(ngrams, id, begin, end, [&](int64_t t, const uint64_t* hashes) {
          int64_t found = 0;
          if (byte_rows && id[t] >= 0 && id[t] < alphabet) rows[found++] = byte_rows + id[t] * byte_stride;
          for (int64_t n = 0; n < count; ++n)
            if (shard.has(hashes[n]))
              rows[found++] =
                  first_rows[n] + (static_cast<int64_t>(hashes[n]) - shard.low) * tables[fused ? 0 : n].stride(0);
          sum_rows(to + t * width, width, found, [&](int64_t n) { return rows[n]; });
        });
      });
    });
    std::fill(to + ngrams.end() * width, to + bytes * width, T(0));
  });
  return out;
}

// --- backward ---------------------------------------------------------------------------------------------------------

// Sums the gradients of all tables: N hashed ones, then the byte table if it has `alphabet` rows. Each is a slot of the
// result, or a part of one: a fused tensor is one slot.
struct TableGrads {
  Tensor grad_out, tokens;
  Ngrams ngrams;
  Shard shard;
  bool fused;
  std::optional<int64_t> alphabet;

  int64_t tables() const { return ngrams.tables() + (alphabet ? 1 : 0); }
  int64_t rows(int64_t table) const { return table < ngrams.tables() ? shard.rows() : *alphabet; }
  int64_t slot(int64_t table) const { return !fused ? table : table < ngrams.tables() ? 0 : 1; }
  int64_t slots() const { return slot(tables() - 1) + 1; }
  int64_t first_row(int64_t table) const { return fused && table < ngrams.tables() ? table * shard.rows() : 0; }

  ReadRows read_rows(RowSorter& sorter, int64_t table) const {
    return sorter.group(rows(table), [&](Reader* readers, uint32_t none) {
      parallel_for(tokens.size(0), kHashGrain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) readers[t] = {none, static_cast<uint32_t>(t)};
        find_rows(table, begin, end, [=](int64_t t, int64_t row) { readers[t].row = static_cast<uint32_t>(row); });
      });
    });
  }

  // Calls f(t, row) for the bytes of [begin, end) that read a row of the table.
  template <class F>
  void find_rows(int64_t table, int64_t begin, int64_t end, const F& f) const {
    dispatch_int(tokens.scalar_type(), "tokens", [&](auto tag) {
      using Id = typename decltype(tag)::type;
      const Id* const id = tokens.const_data_ptr<Id>();
      if (table < ngrams.tables()) {
        for_each_hash(ngrams.only(table), id, begin, end, [&](int64_t t, const uint64_t* hash) {
          if (shard.has(*hash)) f(t, static_cast<int64_t>(*hash) - shard.low);
        });
      } else if (shard.has_byte_table()) {
        for (int64_t t = begin; t < std::min(end, ngrams.end()); ++t)
          if (id[t] >= 0 && id[t] < *alphabet) f(t, static_cast<int64_t>(id[t]));
      }
    });
  }
};

TableGrads check_backward(const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
                          int64_t num_documents, const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                          const std::optional<std::vector<int64_t>>& row_range, int64_t vocab, bool fused,
                          std::optional<int64_t> alphabet) {
  const Tensor rows = unit_rows(grad_out, "grad_out");
  const Ngrams ngrams = check_ngrams(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab);
  check_size(rows, "grad_out", 0, tokens.size(0));
  return {rows, as_contiguous(tokens), ngrams, check_shard(row_range, vocab), fused, alphabet};
}

// out = sum of the gradients of all bytes that read the g-th row
template <class T>
void sum_readers(T* out, int64_t width, const T* grad, int64_t stride, const ReadRows& read, int64_t g) {
  const Reader* const reader = read.readers + read.starts[g];
  sum_rows(out, width, read.starts[g + 1] - read.starts[g], [=](int64_t i) { return grad + reader[i].byte * stride; });
}

std::vector<Tensor> ngram_hash_embed_bwd_cpu(const Tensor& grad_out, const Tensor& tokens,
                                             const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                             const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                                             const std::optional<std::vector<int64_t>>& row_range, int64_t vocab,
                                             bool fused, std::optional<int64_t> alphabet) {
  const TableGrads grads = check_backward(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, num_functions,
                                          row_range, vocab, fused, alphabet);
  const int64_t width = grads.grad_out.size(1), stride = grads.grad_out.stride(0);
  std::vector<int64_t> sizes(grads.slots(), 0);
  for (int64_t n = 0; n < grads.tables(); ++n) sizes[grads.slot(n)] += grads.rows(n);
  std::vector<Tensor> result;
  for (const int64_t size : sizes) result.push_back(new_output(grads.grad_out, {size, width}));
  RowSorter sorter(grads.tokens);
  dispatch_float(grads.grad_out.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = grads.grad_out.const_data_ptr<T>();
    for (int64_t n = 0; n < grads.tables(); ++n) {
      T* const to = result[grads.slot(n)].mutable_data_ptr<T>() + grads.first_row(n) * width;
      const ReadRows read = grads.read_rows(sorter, n);
      const int64_t rows = grads.rows(n);
      std::fill_n(to, (read.count ? read.row(0) : rows) * width, T(0));
      parallel_segments(read.starts, read.count, row_grain(width), [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; ++g) {
          const int64_t row = read.row(g), next = g + 1 < read.count ? read.row(g + 1) : rows;
          sum_readers(to + row * width, width, from, stride, read, g);
          std::fill(to + (row + 1) * width, to + next * width, T(0));
        }
      });
    }
  });
  return result;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> ngram_hash_embed_sparse_bwd_cpu(
    const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
    const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
    const std::optional<std::vector<int64_t>>& row_range, int64_t vocab, bool fused, std::optional<int64_t> alphabet) {
  const TableGrads grads = check_backward(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, num_functions,
                                          row_range, vocab, fused, alphabet);
  const int64_t width = grads.grad_out.size(1), stride = grads.grad_out.stride(0);
  RowSorter sorter(grads.tokens);
  std::vector<int64_t> sizes(grads.slots(), 0);
  for (int64_t n = 0; n < grads.tables(); ++n) sizes[grads.slot(n)] += grads.read_rows(sorter, n).count;
  std::vector<Tensor> rows, values;
  for (const int64_t size : sizes) {
    rows.push_back(new_output(grads.tokens, {size}, ScalarType::Long));
    values.push_back(new_output(grads.grad_out, {size, width}));
  }
  dispatch_float(grads.grad_out.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = grads.grad_out.const_data_ptr<T>();
    std::vector<int64_t> written(grads.slots(), 0);
    for (int64_t n = 0; n < grads.tables(); ++n) {
      const int64_t slot = grads.slot(n), before = written[slot];
      const ReadRows read = grads.read_rows(sorter, n);
      int64_t* const row = rows[slot].mutable_data_ptr<int64_t>() + before;
      T* const value = values[slot].mutable_data_ptr<T>() + before * width;
      parallel_segments(read.starts, read.count, row_grain(width), [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; ++g) {
          row[g] = grads.first_row(n) + read.row(g);
          sum_readers(value + g * width, width, from, stride, read, g);
        }
      });
      written[slot] += read.count;
    }
  });
  return {rows, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("ngram_hash_fwd", TORCH_BOX(&ngram_hash_fwd_cpu));
  m.impl("ngram_hash_embed_fwd", TORCH_BOX(&ngram_hash_embed_fwd_cpu));
  m.impl("ngram_hash_embed_bwd", TORCH_BOX(&ngram_hash_embed_bwd_cpu));
  m.impl("ngram_hash_embed_sparse_bwd", TORCH_BOX(&ngram_hash_embed_sparse_bwd_cpu));
}

}  // namespace blt
