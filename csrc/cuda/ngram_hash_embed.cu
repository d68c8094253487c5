// Launchers of ngram_hash_embed.cuh. Grids follow from the shapes alone; only the sparse gradient, whose size is the number
// of distinct rows, copies these numbers to the host.

#include "ngram_hash_embed.cuh"

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/hash_primes.h"
#include "../launch/launch.h"

namespace blt {
namespace {

static_assert(kPrimes.size() == kMaxFunctions, "a prime for each function");

// --- checks -----------------------------------------------------------------------------------------------------------

Modulus modulus_of(int64_t divisor) {
  STD_TORCH_CHECK(divisor >= 1, "vocab: expected a value >= 1, got ", divisor);
  const auto d = static_cast<u64>(divisor);
  const int bits = std::bit_width(d - 1);
  // The long division of (2^bits - d) * 2^64 by d.
  u64 rest = (u64{1} << bits) - d, quotient = 0;
  for (int i = 0; i < 64; ++i) {
    const bool over = rest >> 63 || rest << 1 >= d;
    rest = (rest << 1) - (over ? d : 0);
    quotient = quotient << 1 | (over ? 1 : 0);
  }
  return {d, quotient + 1, ~u64{0} % d + 1, bits};
}

// What all ops are told about the text and its n-grams; the tensors are contiguous. Without cu_seqlens every document has
// `length` bytes.
struct Hashed {
  Tensor tokens;
  std::optional<Tensor> cu_seqlens;
  int64_t documents;
  i32 length = 0;
  Ngrams ngrams = {};

  int64_t bytes() const { return tokens.size(0); }
  int tables() const { return ngrams.tables; }
  template <class Id>
  Text<Id> text(const Device& device) const {
    return {device.read<Id>(tokens), cu_seqlens ? device.read<i32>(*cu_seqlens) : nullptr, bytes(), documents, length};
  }
};

Hashed check_hashed(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                    const std::vector<int64_t>& sizes, int64_t num_functions, int64_t vocab) {
  check_dim(tokens, "tokens", 1);
  STD_TORCH_CHECK(tokens.size(0) <= INT32_MAX, "tokens: ", tokens.size(0), " do not fit into int32");
  Hashed hashed = {as_contiguous(tokens), cu_seqlens, num_documents};
  if (hashed.cu_seqlens) {
    check_int32(*hashed.cu_seqlens, "cu_seqlens");
    hashed.documents = count_of(*hashed.cu_seqlens, "cu_seqlens");
  } else {
    hashed.length = check_even_documents(num_documents, tokens.size(0));
  }
  STD_TORCH_CHECK(num_functions >= 1 && num_functions <= kMaxFunctions, "num_functions: expected 1 to ", kMaxFunctions,
                  ", got ", num_functions);
  const int64_t count = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(count >= 1 && num_functions * count <= kMaxTables, "ngram_sizes: expected 1 to ", kMaxTables,
                  " tables on CUDA, got ", num_functions, " functions of ", count, " sizes");
  std::copy(kPrimes.begin(), kPrimes.end(), hashed.ngrams.primes);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(sizes[i] >= 1, "ngram_sizes: expected values >= 1, got ", sizes[i]);
    hashed.ngrams.sizes[i] = sizes[i];
  }
  hashed.ngrams.num_sizes = static_cast<int>(count);
  hashed.ngrams.tables = static_cast<int>(num_functions * count);
  hashed.ngrams.vocab = modulus_of(vocab);
  return hashed;
}

// Of all shards, the one that begins at row 0 reads the byte table.
Shard check_shard(const std::optional<std::vector<int64_t>>& row_range, int64_t vocab, int64_t alphabet) {
  if (!row_range) return {0, static_cast<u64>(vocab), alphabet};
  STD_TORCH_CHECK(row_range->size() == 2, "row_range: expected 2 entries, got ", row_range->size());
  const int64_t low = row_range->front(), high = row_range->back();
  STD_TORCH_CHECK(0 <= low && low < high && high <= vocab, "row_range: expected 0 <= lo < hi <= ", vocab, ", got ", low,
                  " and ", high);
  return {static_cast<u64>(low), static_cast<u64>(high - low), low == 0 ? alphabet : 0};
}

void check_width(int64_t width) {
  STD_TORCH_CHECK(width <= INT32_MAX, "tables: rows of ", width, " do not fit into int32");
}

template <class F>
void dispatch_ids(const Tensor& tokens, F&& f) {
  dispatch_int(tokens.scalar_type(), "tokens", [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == sizeof(i32))
      f(Tag<i32>{});
    else
      f(Tag<i64>{});
  });
}

// --- forward ----------------------------------------------------------------------------------------------------------

Tensor ngram_hash_fwd_cuda(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                           const std::vector<int64_t>& ngram_sizes, int64_t num_functions, int64_t vocab) {
  const Hashed hashed = check_hashed(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab);
  const Device device(hashed.tokens);
  Tensor hashes = device_output(hashed.tokens, {hashed.tables(), hashed.bytes()}, ScalarType::Long);
  dispatch_ids(hashed.tokens, [&](auto tag) {
    using Id = typename decltype(tag)::type;
    device.launch<ngram_hash_fwd_kernel<Id>>(
        {.grid = {ceil_div<int64_t>(hashed.bytes(), kHashThreads)}, .block = kHashThreads}, hashed.text<Id>(device),
        hashed.ngrams, device.write<i64>(hashes));
  });
  return hashes;
}

Tensor ngram_hash_embed_fwd_cuda(const Tensor& tokens, std::vector<Tensor> tables, std::optional<Tensor> byte_table,
                                 const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                 const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                                 [[maybe_unused]] const std::string& grad,
                                 const std::optional<std::vector<int64_t>>& row_range, int64_t vocab) {
  const Hashed hashed = check_hashed(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab);
  const int64_t count = hashed.tables();
  const bool fused = tables.size() == 1;
  STD_TORCH_CHECK(fused || static_cast<int64_t>(tables.size()) == count, "tables: expected 1 or ", count, ", got ",
                  tables.size());
  const Shard shard = check_shard(row_range, vocab, byte_table ? byte_table->size(0) : 0);
  const int64_t rows = static_cast<int64_t>(shard.rows);
  for (Tensor& table : tables) {
    table = unit_rows(table, "tables");
    check_dtype(table, "tables", tables[0].scalar_type());
    check_size(table, "tables", 0, (fused ? count : 1) * rows);
    check_size(table, "tables", 1, tables[0].size(1));
  }
  const int64_t width = tables[0].size(1);
  check_width(width);
  if (byte_table) {
    byte_table = unit_rows(*byte_table, "byte_table");
    check_dtype(*byte_table, "byte_table", tables[0].scalar_type());
    check_size(*byte_table, "byte_table", 1, width);
  }
  const Device device(tables[0]);
  Tensor out = device_output(tables[0], {hashed.bytes(), width});
  if (out.numel() == 0) return out;
  dispatch_device_float(out.scalar_type(), "tables", [&](auto tag) {
    using T = typename decltype(tag)::type;
    TableRows<const T> from = {};
    int64_t places = bytes_of<T>(width);
    const auto add = [&](int64_t list, const Tensor& table, int64_t first_row) {
      from.strides[list] = table.stride(0);
      from.first[list] = device.read<T>(table) + first_row * table.stride(0);
      places |= address(from.first[list]) | row_bytes(table);
    };
    for (int64_t n = 0; n < count; ++n) add(n, tables[fused ? 0 : n], fused ? n * rows : 0);
    if (byte_table) add(count, *byte_table, 0);
    dispatch_ids(hashed.tokens, [&](auto id_tag) {
      using Id = typename decltype(id_tag)::type;
      dispatch_pack<T>({places}, [&](auto pack) {
        device.launch<ngram_hash_embed_fwd_kernel<T, Id, pack()>>(
            {.grid = {ceil_div<int64_t>(hashed.bytes(), kEmbedBytes)},
             .block = kEmbedThreads,
             .smem_bytes = bytes_of<const T*>(kEmbedBytes * (count + 1))},
            hashed.text<Id>(device), hashed.ngrams, shard, from, width, device.write<T>(out));
      });
    });
  });
  return out;
}

// --- backward ---------------------------------------------------------------------------------------------------------

// The gradients of all tables: N hashed ones, then the byte table if it has `alphabet` rows. Each is a slot of the result,
// or a part of one: a fused tensor is one slot.
struct TableGrads {
  Tensor grad_out;
  Hashed hashed;
  Shard shard;
  bool fused;
  std::optional<int64_t> alphabet;

  int64_t bytes() const { return hashed.bytes(); }
  int64_t width() const { return grad_out.size(1); }
  int64_t tables() const { return hashed.tables(); }
  int64_t lists() const { return tables() + (alphabet ? 1 : 0); }
  int64_t rows(int64_t list) const { return list < tables() ? static_cast<int64_t>(shard.rows) : *alphabet; }
  int64_t slot(int64_t list) const { return !fused ? list : list < tables() ? 0 : 1; }
  int64_t slots() const { return slot(lists() - 1) + 1; }
  int64_t first_row(int64_t list) const { return fused && list < tables() ? list * rows(list) : 0; }
  // Behind every row: what a reader of none has for a row.
  u32 none() const { return static_cast<u32>(std::max(rows(0), rows(lists() - 1))); }
};

TableGrads check_backward(const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
                          int64_t num_documents, const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                          const std::optional<std::vector<int64_t>>& row_range, int64_t vocab, bool fused,
                          std::optional<int64_t> alphabet) {
  const TableGrads grads = {unit_rows(grad_out, "grad_out"),
                            check_hashed(tokens, cu_seqlens, num_documents, ngram_sizes, num_functions, vocab),
                            check_shard(row_range, vocab, alphabet.value_or(0)), fused, alphabet};
  check_size(grads.grad_out, "grad_out", 0, grads.bytes());
  check_width(grads.width());
  STD_TORCH_CHECK(grads.rows(grads.lists() - 1) >= 0, "alphabet: expected a value >= 0");
  for (const int64_t list : {int64_t{0}, grads.lists() - 1})
    STD_TORCH_CHECK(grads.rows(list) < UINT32_MAX, "tables: ", grads.rows(list), " rows are too many to sort");
  return grads;
}

// Counts of digits become places: at once, or by segments of kScanTiles tiles.
void place_digits(const Device& device, int64_t lists, int64_t tiles, u32* counts, u32* segments) {
  const int64_t parts = ceil_div<int64_t>(tiles, kScanTiles);
  const LaunchConfig scan = {.grid = {lists}, .block = kSortThreads};
  if (parts == 1) return device.launch<radix_scan_kernel<kSortBits>>(scan, counts, tiles);
  const LaunchConfig grid = {.grid = {parts, lists}, .block = kSortThreads};
  device.launch<radix_sum_kernel<kSortBits>>(grid, counts, tiles, segments);
  device.launch<radix_scan_kernel<kSortBits>>(scan, segments, parts);
  device.launch<radix_spread_kernel<kSortBits>>(grid, counts, tiles, segments);
}

// readers[lists][bytes], sorted: from one tensor to another and back, a pass for each digit of the rows.
Tensor sort_readers(const Device& device, const TableGrads& grads) {
  const int64_t bytes = grads.bytes(), lists = grads.lists(), tiles = ceil_div<int64_t>(bytes, kSortTile);
  Tensor from = device_output(grads.hashed.tokens, {lists, bytes}, ScalarType::Long);
  Tensor to = device_output(from, {lists, bytes});
  Tensor counts = device_output(from, {lists, tiles, kSortThreads}, ScalarType::Int);
  Tensor sums = device_output(from, {lists, ceil_div<int64_t>(tiles, kScanTiles), kSortThreads}, ScalarType::Int);
  if (bytes == 0) return from;
  const LaunchConfig grid = {.grid = {tiles, lists}, .block = kSortThreads};
  u32* const places = device.write<u32>(counts);
  u32* const segments = device.write<u32>(sums);
  dispatch_ids(grads.hashed.tokens, [&](auto tag) {
    using Id = typename decltype(tag)::type;
    device.launch<ngram_readers_kernel<Id>>(grid, grads.hashed.text<Id>(device), grads.hashed.ngrams, grads.shard,
                                            grads.none(), device.write<Reader>(from), places);
  });
  device.write<Reader>(to);
  for (int shift = 0; shift < static_cast<int>(std::bit_width(grads.none())); shift += kSortBits) {
    if (shift > 0) device.launch<radix_count_kernel<kSortBits>>(grid, device.read<Reader>(from), bytes, shift, places);
    place_digits(device, lists, tiles, places, segments);
    device.launch<radix_scatter_kernel<kSortBits>>(grid, device.read<Reader>(from), bytes, shift, places,
                                                   device.write<Reader>(to));
    std::swap(from, to);
  }
  return from;
}

// starts[lists][bytes + 1] and totals[lists] of the runs of sorted readers; see run_starts_kernel.
struct RunTensors {
  Tensor starts, totals;
};

RunTensors find_runs(const Device& device, const TableGrads& grads, const Tensor& sorted) {
  const int64_t lists = grads.lists(), bytes = grads.bytes(), tiles = ceil_div<int64_t>(bytes, kSortTile);
  RunTensors runs = {device_output(sorted, {lists, bytes + 1}, ScalarType::Int),
                     device_output(sorted, {lists}, ScalarType::Int)};
  if (bytes == 0) {
    device.zero(runs.totals);
    return runs;
  }
  Tensor counts = device_output(sorted, {lists, tiles}, ScalarType::Int);
  const LaunchConfig grid = {.grid = {tiles, lists}, .block = kSortThreads};
  const Reader* const readers = device.read<Reader>(sorted);
  u32* const found = device.write<u32>(counts);
  device.launch<run_count_kernel<kSortItems>>(grid, readers, bytes, found);
  device.launch<run_scan_kernel<kSortItems>>({.grid = {lists}, .block = kSortThreads}, found, tiles);
  device.launch<run_starts_kernel<kSortItems>>(grid, readers, bytes, grads.none(), found,
                                               device.write<u32>(runs.starts), device.write<i32>(runs.totals));
  return runs;
}

// f(Tag<T>, Constant<pack>, readers) once the readers are sorted and their chunks added up, level by level.
template <class F>
void with_readers(const Device& device, const TableGrads& grads, const Tensor& sorted, F&& f) {
  using Sizes = Readers<float>;
  const int64_t lists = grads.lists(), bytes = grads.bytes(), width = grads.width();
  int levels = 0;
  int64_t rows = 0;
  for (; Sizes::sums_of(bytes, levels + 1) >= 2; ++levels) rows += lists * Sizes::sums_of(bytes, levels + 1);
  Tensor sums = device_output(grads.grad_out, {rows, width}, accumulator(grads.grad_out));
  dispatch_device_float(grads.grad_out.scalar_type(), "grad_out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const grad = device.read<T>(grads.grad_out);
    const Readers<T> readers = {device.read<Reader>(sorted), bytes, grad,
                                grads.grad_out.stride(0),    width, device.write<acc_t<T>>(sums),
                                static_cast<int>(lists),     levels};
    dispatch_pack<T>({address(grad), row_bytes(grads.grad_out), bytes_of<T>(width)}, [&](auto pack) {
      for (int level = 1; level <= levels && width > 0; ++level)
        device.launch<ngram_chunk_sums_kernel<T, pack()>>(
            {.grid = {Sizes::sums_of(bytes, level), lists}, .block = kEmbedThreads}, readers, level, grads.none());
      f(tag, pack, readers);
    });
  });
}

// launch(config, owned, first_list) for the hashed tables and for the byte table, of whose lists none has more than max_runs
// runs. A block owns some runs for each of its threads' columns, fewer where each has more readers.
template <class F>
void launch_owners(const TableGrads& grads, int pack, int64_t first_list, int64_t lists, int64_t max_runs, F&& launch) {
  constexpr int64_t kReaders = 8;  // for a thread, if they are shared equally
  if (max_runs == 0) return;
  const int64_t beside = std::max<int64_t>(1, kEmbedThreads * pack / std::max<int64_t>(1, grads.width()));
  const int64_t each = std::max<int64_t>(1, kReaders * max_runs / grads.bytes());
  const int64_t owned = std::min<int64_t>(kMaxOwned, beside * std::min(each, kReaders));
  launch(LaunchConfig{.grid = {ceil_div(max_runs, owned), lists}, .block = kEmbedThreads}, static_cast<int>(owned),
         static_cast<int>(first_list));
}

std::vector<Tensor> ngram_hash_embed_bwd_cuda(const Tensor& grad_out, const Tensor& tokens,
                                              const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                              const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
                                              const std::optional<std::vector<int64_t>>& row_range, int64_t vocab,
                                              bool fused, std::optional<int64_t> alphabet) {
  const TableGrads grads = check_backward(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, num_functions,
                                          row_range, vocab, fused, alphabet);
  const Device device(grads.grad_out);
  std::vector<int64_t> sizes(grads.slots(), 0);
  for (int64_t n = 0; n < grads.lists(); ++n) sizes[grads.slot(n)] += grads.rows(n);
  std::vector<Tensor> result;
  for (const int64_t size : sizes) {
    result.push_back(device_output(grads.grad_out, {size, grads.width()}));
    device.zero(result.back());
  }
  if (grads.width() == 0 || grads.bytes() == 0) return result;
  const Tensor sorted = sort_readers(device, grads);
  const RunTensors found = find_runs(device, grads, sorted);
  with_readers(device, grads, sorted, [&](auto tag, auto pack, const auto& readers) {
    using T = typename decltype(tag)::type;
    TableRows<T> to = {};
    for (int64_t n = 0; n < grads.lists(); ++n)
      to.first[n] = device.write<T>(result[grads.slot(n)]) + grads.first_row(n) * grads.width();
    const auto launch = [&](const LaunchConfig& config, int owned, int first_list) {
      const Runs runs = {device.read<u32>(found.starts), device.read<i32>(found.totals), owned};
      device.launch<ngram_hash_embed_bwd_kernel<T, pack()>>(config, readers, runs, first_list, to);
    };
    const auto max_runs = [&](int64_t list) { return std::min(grads.bytes(), grads.rows(list)); };
    launch_owners(grads, pack(), 0, grads.tables(), max_runs(0), launch);
    if (grads.alphabet) launch_owners(grads, pack(), grads.tables(), 1, max_runs(grads.tables()), launch);
  });
  return result;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> ngram_hash_embed_sparse_bwd_cuda(
    const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
    const std::vector<int64_t>& ngram_sizes, int64_t num_functions,
    const std::optional<std::vector<int64_t>>& row_range, int64_t vocab, bool fused, std::optional<int64_t> alphabet) {
  const TableGrads grads = check_backward(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, num_functions,
                                          row_range, vocab, fused, alphabet);
  const Device device(grads.grad_out);
  const int64_t lists = grads.lists(), width = grads.width();
  const Tensor sorted = sort_readers(device, grads);
  const RunTensors found = find_runs(device, grads, sorted);
  // The one place that waits for the device.
  const Tensor here = torch::stable::to(found.totals, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const std::vector<int32_t> runs(here.const_data_ptr<int32_t>(), here.const_data_ptr<int32_t>() + lists);
  std::vector<int64_t> sizes(grads.slots(), 0), before(lists, 0);
  for (int64_t n = 0; n < lists; ++n) before[n] = sizes[grads.slot(n)], sizes[grads.slot(n)] += runs[n];
  std::vector<Tensor> rows, values;
  for (const int64_t size : sizes) {
    rows.push_back(device_output(grads.hashed.tokens, {size}, ScalarType::Long));
    values.push_back(device_output(grads.grad_out, {size, width}));
  }
  with_readers(device, grads, sorted, [&](auto tag, auto pack, const auto& readers) {
    using T = typename decltype(tag)::type;
    SparseGrads<T> to = {};
    to.tables = static_cast<int>(grads.tables());
    to.numbers = grads.fused ? grads.rows(0) : 0;
    for (int64_t n = 0; n < lists; ++n) {
      to.rows[n] = device.write<i64>(rows[grads.slot(n)]) + before[n];
      to.values[n] = device.write<T>(values[grads.slot(n)]) + before[n] * width;
    }
    const auto launch = [&](const LaunchConfig& config, int owned, int first_list) {
      const Runs owners = {device.read<u32>(found.starts), device.read<i32>(found.totals), owned};
      device.launch<ngram_hash_embed_sparse_bwd_kernel<T, pack()>>(config, readers, owners, first_list, to);
    };
    launch_owners(grads, pack(), 0, grads.tables(), *std::max_element(runs.begin(), runs.begin() + grads.tables()),
                  launch);
    if (grads.alphabet) launch_owners(grads, pack(), grads.tables(), 1, runs.back(), launch);
  });
  return {rows, values};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("ngram_hash_fwd", TORCH_BOX(&ngram_hash_fwd_cuda));
  m.impl("ngram_hash_embed_fwd", TORCH_BOX(&ngram_hash_embed_fwd_cuda));
  m.impl("ngram_hash_embed_bwd", TORCH_BOX(&ngram_hash_embed_bwd_cuda));
  m.impl("ngram_hash_embed_sparse_bwd", TORCH_BOX(&ngram_hash_embed_sparse_bwd_cuda));
}

}  // namespace blt
