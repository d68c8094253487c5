// ngram_hash_embed adds to the embedding of a byte one hashed row for each n-gram that ends at it.
//
//   out[t] = byte_table[token[t]] + sum over tables n of table_n[hash_n(t)],  added up in fp32 and rounded once
//   grad_table_n[row] = sum of grad_out[t] over the bytes t with hash_n(t) = row, in their order
//
// Forward: threads share the bytes; a byte's hashes stay in registers and its rows are added up in L1. Bytes: N + 1
// rows read and one written per byte of text. With large tables every row is a cache miss, which bounds the speed.
//
// Backward, a table at a time: all bytes are hashed again and sorted by row, and one owner adds up each row. A dense
// gradient is written once, zeros included. Bytes: a row read per byte and table, and the gradient written.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/box.h"
#include "../common/dispatch.h"
#include "ngram_hash.h"
#include "sorted_rows.h"
#include "support/alloc.h"
#include "support/parallel.h"
#include "support/rows.h"

namespace blt {
namespace {

constexpr int64_t kHashGrain = 2048;  // so many bytes are worth a thread

Tensor ngram_hash_fwd_cpu(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                          const std::vector<int64_t>& ngram_sizes, const std::optional<std::vector<int64_t>>& functions,
                          const std::vector<int64_t>& vocab) {
  const HashArguments arguments = check_hash(tokens, cu_seqlens, num_documents, ngram_sizes, functions, vocab);
  const Ngrams ngrams = ngrams_of(arguments);
  const Tensor& ids = arguments.tokens;
  const int64_t bytes = arguments.bytes(), tables = arguments.tables();
  Tensor hashes = new_output(ids, {tables, bytes}, ScalarType::Long);
  int64_t* const out = hashes.mutable_data_ptr<int64_t>();
  dispatch_int(ids.scalar_type(), "tokens", [&]<class Id>(Tag<Id>) {
    const Id* const id = ids.const_data_ptr<Id>();
    parallel_for(bytes, kHashGrain, [&](int64_t begin, int64_t end) {
      for_each_hash(ngrams, id, begin, end, [=](int64_t t, const uint64_t* rows) {
        for (int64_t n = 0; n < tables; ++n) out[n * bytes + t] = static_cast<int64_t>(rows[n]);
      });
    });
  });
  for (int64_t n = 0; n < tables; ++n)
    std::fill(out + n * bytes + ngrams.end_of_documents(), out + (n + 1) * bytes, int64_t{0});
  return hashes;
}

// --- forward ---------------------------------------------------------------------------------------------------------

Tensor ngram_hash_embed_fwd_cpu(const Tensor& tokens, std::vector<Tensor> tables, std::optional<Tensor> byte_table,
                                const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                const std::vector<int64_t>& ngram_sizes,
                                const std::optional<std::vector<int64_t>>& functions,
                                [[maybe_unused]] const std::string& grad,
                                const std::optional<std::vector<int64_t>>& row_range,
                                const std::optional<std::vector<int64_t>>& vocab) {
  const EmbedArguments arguments = check_embed(tokens, std::move(tables), std::move(byte_table), cu_seqlens,
                                               num_documents, ngram_sizes, functions, row_range, vocab);
  const Ngrams ngrams = ngrams_of(arguments.hash);
  const TableShard& shard = arguments.shard;
  const Tensor& ids = arguments.hash.tokens;
  const int64_t count = arguments.hash.tables(), bytes = arguments.hash.bytes(), width = arguments.width();
  byte_table = shard.has_byte_table() ? arguments.byte_table : std::nullopt;
  Tensor out = new_output(arguments.tables[0], {bytes, width});
  dispatch_float(out.scalar_type(), "tables", [&]<class T>(Tag<T>) {
    std::vector<const T*> first_rows(count);
    std::vector<int64_t> strides(count);
    for (int64_t n = 0; n < count; ++n) {
      strides[n] = arguments.table(n).stride(0);
      first_rows[n] = arguments.table(n).const_data_ptr<T>() + arguments.first_row(n) * strides[n];
    }
    const T* const byte_rows = byte_table ? byte_table->const_data_ptr<T>() : nullptr;
    const int64_t alphabet = byte_table ? byte_table->size(0) : 0, byte_stride = byte_table ? byte_table->stride(0) : 0;
    T* const to = out.mutable_data_ptr<T>();
    dispatch_int(ids.scalar_type(), "tokens", [&]<class Id>(Tag<Id>) {
      const Id* const id = ids.const_data_ptr<Id>();
      parallel_for(bytes, row_grain(width * (count + 1)), [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(count + 1);
        for_each_hash(ngrams, id, begin, end, [&](int64_t t, const uint64_t* hashes) {
          int64_t found = 0;
          if (byte_rows && id[t] >= 0 && id[t] < alphabet) rows[found++] = byte_rows + id[t] * byte_stride;
          for (int64_t n = 0; n < count; ++n)
            if (shard.has(hashes[n]))
              rows[found++] = first_rows[n] + (static_cast<int64_t>(hashes[n]) - shard.low) * strides[n];
          sum_rows(to + t * width, width, found, [&](int64_t n) { return rows[n]; });
        });
      });
    });
    std::fill(to + ngrams.end_of_documents() * width, to + bytes * width, T(0));
  });
  return out;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Finds the bytes that read each row of a table, and adds up their gradients.
struct TableGrads : TableGradArguments {
  Ngrams ngrams;
  RowSorter sorter;

  explicit TableGrads(const TableGradArguments& arguments)
      : TableGradArguments(arguments), ngrams(ngrams_of(hash)), sorter(hash.tokens) {}

  // The result is valid until the next call.
  ReadRows read_rows(int64_t table) {
    return sorter.group(rows(table), [&](Reader* readers, uint32_t none) {
      dispatch_int(hash.tokens.scalar_type(), "tokens", [&]<class Id>(Tag<Id>) {
        const Id* const id = hash.tokens.const_data_ptr<Id>();
        parallel_for(bytes(), kHashGrain, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) readers[t] = {none, static_cast<uint32_t>(t)};
          if (table < hash.tables()) {
            for_each_hash(ngrams.only(table), id, begin, end, [&](int64_t t, const uint64_t* row) {
              if (shard.has(*row)) readers[t].row = static_cast<uint32_t>(static_cast<int64_t>(*row) - shard.low);
            });
          } else if (shard.has_byte_table()) {
            for (int64_t t = begin; t < std::min(end, ngrams.end_of_documents()); ++t)
              if (id[t] >= 0 && id[t] < *alphabet) readers[t].row = static_cast<uint32_t>(id[t]);
          }
        });
      });
    });
  }

  // Writes to out(g) the sum of the gradients of all bytes that read the g-th row that is read.
  template <class T, class Out>
  void sum_readers(const ReadRows& read, const Out& out) const {
    const T* const grad = grad_out.const_data_ptr<T>();
    const int64_t stride = grad_out.stride(0), columns = width();
    parallel_segments(read.starts, read.count, row_grain(columns), [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        const Reader* const reader = read.readers + read.starts[g];
        sum_rows(out(g), columns, read.starts[g + 1] - read.starts[g],
                 [=](int64_t i) { return grad + reader[i].byte * stride; });
      }
    });
  }
};

std::vector<Tensor> ngram_hash_embed_bwd_cpu(const Tensor& grad_out, const Tensor& tokens,
                                             const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                             const std::vector<int64_t>& ngram_sizes,
                                             const std::optional<std::vector<int64_t>>& functions,
                                             const std::optional<std::vector<int64_t>>& row_range,
                                             const std::vector<int64_t>& vocab, bool fused,
                                             std::optional<int64_t> alphabet) {
  TableGrads grads(check_table_grads(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, functions, row_range,
                                     vocab, fused, alphabet));
  const int64_t width = grads.width();
  std::vector<int64_t> sizes(grads.results(), 0);
  for (int64_t n = 0; n < grads.tables(); ++n) sizes[grads.result(n)] += grads.rows(n);
  std::vector<Tensor> result;
  for (const int64_t size : sizes) result.push_back(new_output(grads.grad_out, {size, width}));
  dispatch_float(grads.grad_out.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    for (int64_t n = 0; n < grads.tables(); ++n) {
      T* const to = result[grads.result(n)].mutable_data_ptr<T>() + grads.first_row(n) * width;
      const ReadRows read = grads.read_rows(n);
      const int64_t rows = grads.rows(n);
      std::fill_n(to, (read.count ? read.row(0) : rows) * width, T(0));
      grads.sum_readers<T>(read, [&](int64_t g) {
        const int64_t row = read.row(g), next = g + 1 < read.count ? read.row(g + 1) : rows;
        std::fill(to + (row + 1) * width, to + next * width, T(0));
        return to + row * width;
      });
    }
  });
  return result;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> ngram_hash_embed_sparse_bwd_cpu(
    const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
    const std::vector<int64_t>& ngram_sizes, const std::optional<std::vector<int64_t>>& functions,
    const std::optional<std::vector<int64_t>>& row_range, const std::vector<int64_t>& vocab, bool fused,
    std::optional<int64_t> alphabet) {
  TableGrads grads(check_table_grads(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, functions, row_range,
                                     vocab, fused, alphabet));
  const int64_t width = grads.width();
  std::vector<int64_t> sizes(grads.results(), 0), before(grads.tables());
  for (int64_t n = 0; n < grads.tables(); ++n) {
    before[n] = sizes[grads.result(n)];
    sizes[grads.result(n)] += grads.read_rows(n).count;
  }
  std::vector<Tensor> rows, values;
  for (const int64_t size : sizes) {
    rows.push_back(new_output(grads.hash.tokens, {size}, ScalarType::Long));
    values.push_back(new_output(grads.grad_out, {size, width}));
  }
  dispatch_float(grads.grad_out.scalar_type(), "grad_out", [&]<class T>(Tag<T>) {
    for (int64_t n = 0; n < grads.tables(); ++n) {
      const ReadRows read = grads.read_rows(n);
      int64_t* const row = rows[grads.result(n)].mutable_data_ptr<int64_t>() + before[n];
      T* const value = values[grads.result(n)].mutable_data_ptr<T>() + before[n] * width;
      grads.sum_readers<T>(read, [&](int64_t g) {
        row[g] = grads.first_row(n) + read.row(g);
        return value + g * width;
      });
    }
  });
  return {rows, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("ngram_hash_fwd", BLT_KERNELS_BOX(&ngram_hash_fwd_cpu));
  m.impl("ngram_hash_embed_fwd", BLT_KERNELS_BOX(&ngram_hash_embed_fwd_cpu));
  m.impl("ngram_hash_embed_bwd", BLT_KERNELS_BOX(&ngram_hash_embed_bwd_cpu));
  m.impl("ngram_hash_embed_sparse_bwd", BLT_KERNELS_BOX(&ngram_hash_embed_sparse_bwd_cpu));
}

}  // namespace blt
