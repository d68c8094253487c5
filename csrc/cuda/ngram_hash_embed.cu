// Launches the kernels of ngram_hash_embed.cuh. Grids follow from the shapes alone, except for the sparse gradient: its
// size is the number of distinct rows, which is copied to the host.

#include "ngram_hash_embed.cuh"

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/args/ngram_hash_embed.h"
#include "../common/box.h"
#include "../launch/launch.h"

namespace blt {
namespace {

static_assert(kPrimes.size() == kMaxFunctions, "a prime for each function");

// --- arguments -------------------------------------------------------------------------------------------------------

// Converts the text and the hashes of its n-grams to what the kernels take.
struct Hashed {
  HashArguments arguments;
  Ngrams ngrams = {};

  explicit Hashed(const HashArguments& arguments) : arguments(arguments) {
    STD_TORCH_CHECK(arguments.tables() <= kMaxTables, "ngram_sizes: expected 1 to ", kMaxTables,
                    " tables on CUDA, got ", arguments.tables());
    std::copy(kPrimes.begin(), kPrimes.end(), ngrams.primes);
    std::ranges::copy(arguments.sizes, ngrams.sizes);
    std::ranges::transform(arguments.functions, ngrams.functions, [](int64_t f) { return static_cast<u8>(f); });
    ngrams.tables = static_cast<int>(arguments.tables());
    ngrams.equal = std::ranges::count(arguments.vocab, arguments.vocab[0]) == arguments.tables();
    if (ngrams.equal) {
      const Reciprocal vocab = reciprocal_of(arguments.vocab[0]);
      ngrams.vocab = {vocab.divisor, vocab.reciprocal, vocab.wrap, vocab.bits};
      return;
    }
    for (const int64_t rows : arguments.vocab)
      STD_TORCH_CHECK(rows <= UINT32_MAX, "vocab: expected less than 2**32 rows on CUDA where sizes differ, got ",
                      rows);
    std::ranges::transform(arguments.vocab, ngrams.rows, [](int64_t rows) { return static_cast<u32>(rows); });
  }
  template <class Id>
  Text<Id> text(const Device& device) const {
    return {device.read<Id>(arguments.tokens), device.read<i32>(arguments.cu_seqlens), arguments.bytes(),
            arguments.documents, arguments.length};
  }
};

ShardRows shard_rows(const TableShard& shard, std::optional<int64_t> alphabet) {
  return {static_cast<u64>(shard.low), static_cast<u64>(shard.high - shard.low),
          shard.has_byte_table() ? alphabet.value_or(0) : 0};
}

void check_width(int64_t width) {
  STD_TORCH_CHECK(width <= INT32_MAX, "tables: rows of ", width, " do not fit into int32");
}

// --- forward ---------------------------------------------------------------------------------------------------------

Tensor ngram_hash_fwd_cuda(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                           const std::vector<int64_t>& ngram_sizes,
                           const std::optional<std::vector<int64_t>>& functions, const std::vector<int64_t>& vocab) {
  const HashArguments arguments = check_hash(tokens, cu_seqlens, num_documents, ngram_sizes, functions, vocab);
  const Hashed hashed(arguments);
  const Device device(arguments.tokens);
  Tensor hashes = device_output(arguments.tokens, {arguments.tables(), arguments.bytes()}, ScalarType::Long);
  dispatch_tokens(arguments.tokens, [&]<class Id>(Tag<Id>) {
    device.launch<ngram_hash_fwd_kernel<Id>>(
        {.grid = {ceil_div<int64_t>(arguments.bytes(), kHashThreads)}, .block = kHashThreads}, hashed.text<Id>(device),
        hashed.ngrams, device.write<i64>(hashes));
  });
  return hashes;
}

Tensor ngram_hash_embed_fwd_cuda(const Tensor& tokens, std::vector<Tensor> tables, std::optional<Tensor> byte_table,
                                 const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                 const std::vector<int64_t>& ngram_sizes,
                                 const std::optional<std::vector<int64_t>>& functions,
                                 [[maybe_unused]] const std::string& grad,
                                 const std::optional<std::vector<int64_t>>& row_range,
                                 const std::optional<std::vector<int64_t>>& vocab) {
  const EmbedArguments arguments =
      check_embed(tokens, tables, byte_table, cu_seqlens, num_documents, ngram_sizes, functions, row_range, vocab);
  const Hashed hashed(arguments.hash);
  byte_table = arguments.byte_table;
  const ShardRows shard = shard_rows(arguments.shard, byte_table ? byte_table->size(0) : 0);
  const int64_t count = arguments.hash.tables(), bytes = arguments.hash.bytes(), width = arguments.width();
  check_width(width);
  const Device device(arguments.tables[0]);
  Tensor out = device_output(arguments.tables[0], {bytes, width});
  if (out.numel() == 0) return out;
  dispatch_device_float(out.scalar_type(), "tables", [&]<class T>(Tag<T>) {
    TableRows<const T> from = {};
    int64_t places = bytes_of<T>(width);
    const auto add = [&](int64_t list, const Tensor& table, int64_t first_row) {
      from.strides[list] = table.stride(0);
      from.first[list] = device.read<T>(table) + first_row * table.stride(0);
      places |= address(from.first[list]) | row_bytes(table);
    };
    for (int64_t n = 0; n < count; ++n) add(n, arguments.table(n), arguments.first_row(n));
    if (byte_table) add(count, *byte_table, 0);
    dispatch_tokens(arguments.hash.tokens, [&]<class Id>(Tag<Id>) {
      dispatch_vec<T>({places}, [&](auto vec) {
        device.launch<ngram_hash_embed_fwd_kernel<T, Id, vec()>>(
            {.grid = {ceil_div<int64_t>(bytes, kEmbedBytes)},
             .block = kEmbedThreads,
             .smem_bytes = bytes_of<const T*>(kEmbedBytes * (count + 1))},
            hashed.text<Id>(device), hashed.ngrams, shard, from, width, device.write<T>(out));
      });
    });
  });
  return out;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Describes the gradients of all tables, each of which has a list of readers; the byte table's is the last.
struct TableGrads : TableGradArguments {
  Hashed hashed;
  ShardRows held;

  explicit TableGrads(const TableGradArguments& arguments)
      : TableGradArguments(arguments), hashed(hash), held(shard_rows(shard, alphabet)) {
    check_width(width());
    STD_TORCH_CHECK(most_rows(lists()) < UINT32_MAX, "tables: ", most_rows(lists()), " rows are too many to sort");
  }
  int64_t lists() const { return TableGradArguments::tables(); }
  int64_t hashed_lists() const { return hash.tables(); }
  // Returns the rows of the largest of the first `count` lists.
  int64_t most_rows(int64_t count) const {
    int64_t most = 0;
    for (int64_t n = 0; n < count; ++n) most = std::max(most, rows(n));
    return most;
  }
  // Returns a sentinel larger than any row, for entries that read nothing.
  u32 none() const { return static_cast<u32>(most_rows(lists())); }
};

// Replaces counts of digits by places, at once or by segments of kScanTiles tiles.
void place_digits(const Device& device, int64_t lists, int64_t tiles, u32* counts, u32* segments) {
  const int64_t parts = ceil_div<int64_t>(tiles, kScanTiles);
  const LaunchConfig scan = {.grid = {lists}, .block = kSortThreads};
  if (parts == 1) return device.launch<radix_scan_kernel>(scan, counts, tiles);
  const LaunchConfig grid = {.grid = {parts, lists}, .block = kSortThreads};
  device.launch<radix_sum_kernel>(grid, counts, tiles, segments);
  device.launch<radix_scan_kernel>(scan, segments, parts);
  device.launch<radix_spread_kernel>(grid, counts, tiles, segments);
}

// Returns readers[lists][bytes] sorted by row. Each digit of the rows takes a pass from one tensor to another.
Tensor sort_readers(const Device& device, const TableGrads& grads) {
  const int64_t bytes = grads.bytes(), lists = grads.lists(), tiles = ceil_div<int64_t>(bytes, kSortTile);
  Tensor from = device_output(grads.hash.tokens, {lists, bytes}, ScalarType::Long);
  Tensor to = device_output(from, {lists, bytes});
  Tensor counts = device_output(from, {lists, tiles, kSortThreads}, ScalarType::Int);
  Tensor sums = device_output(from, {lists, ceil_div<int64_t>(tiles, kScanTiles), kSortThreads}, ScalarType::Int);
  if (bytes == 0) return from;
  const LaunchConfig grid = {.grid = {tiles, lists}, .block = kSortThreads};
  u32* const places = device.write<u32>(counts);
  u32* const segments = device.write<u32>(sums);
  dispatch_tokens(grads.hash.tokens, [&]<class Id>(Tag<Id>) {
    device.launch<ngram_readers_kernel<Id>>(grid, grads.hashed.text<Id>(device), grads.hashed.ngrams, grads.held,
                                            grads.none(), device.write<Reader>(from), places);
  });
  device.write<Reader>(to);
  for (int shift = 0; shift < static_cast<int>(std::bit_width(grads.none())); shift += kSortBits) {
    if (shift > 0) device.launch<radix_count_kernel>(grid, device.read<Reader>(from), bytes, shift, places);
    place_digits(device, lists, tiles, places, segments);
    device.launch<radix_scatter_kernel>(grid, device.read<Reader>(from), bytes, shift, places,
                                        device.write<Reader>(to));
    std::swap(from, to);
  }
  return from;
}

// Has starts[lists][bytes + 1] and totals[lists] of the runs of sorted readers; see run_starts_kernel.
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
  device.launch<run_count_kernel>(grid, readers, bytes, found);
  device.launch<run_scan_kernel>({.grid = {lists}, .block = kSortThreads}, found, tiles);
  device.launch<run_starts_kernel>(grid, readers, bytes, grads.none(), found, device.write<u32>(runs.starts),
                                   device.write<i32>(runs.totals));
  return runs;
}

// Adds up the chunks of the sorted readers, level by level, then calls f(Tag<T>, Constant<vec>, readers).
template <class F>
void with_readers(const Device& device, const TableGrads& grads, const Tensor& sorted, F&& f) {
  using Sizes = SortedReaders<float>;
  const int64_t lists = grads.lists(), bytes = grads.bytes(), width = grads.width();
  int levels = 0;
  int64_t rows = 0;
  for (; Sizes::sums_of(bytes, levels + 1) >= 2; ++levels) rows += lists * Sizes::sums_of(bytes, levels + 1);
  Tensor sums = device_output(grads.grad_out, {rows, width}, accumulator(grads.grad_out));
  dispatch_device_float(grads.grad_out.scalar_type(), "grad_out", [&]<class T>(Tag<T> tag) {
    const T* const grad = device.read<T>(grads.grad_out);
    const SortedReaders<T> readers = {device.read<Reader>(sorted), bytes, grad,
                                      grads.grad_out.stride(0),    width, device.write<acc_t<T>>(sums),
                                      static_cast<int>(lists),     levels};
    dispatch_vec<T>({address(grad), row_bytes(grads.grad_out), bytes_of<T>(width)}, [&](auto vec) {
      for (int level = 1; level <= levels && width > 0; ++level)
        device.launch<ngram_chunk_sums_kernel<T, vec()>>(
            {.grid = {Sizes::sums_of(bytes, level), lists}, .block = kEmbedThreads}, readers, level, grads.none());
      f(tag, vec, readers);
    });
  });
}

// Calls launch(config, owned, first_list) for `lists` lists of at most `max_runs` runs each. A block owns `owned` runs,
// fewer if runs have more readers.
template <class F>
void launch_owners(const TableGrads& grads, int vec, int64_t first_list, int64_t lists, int64_t max_runs, F&& launch) {
  constexpr int64_t kReaders = 8;  // a thread has so many, if runs have equal numbers of readers
  if (max_runs == 0) return;
  const int64_t beside = std::max<int64_t>(1, kEmbedThreads * vec / std::max<int64_t>(1, grads.width()));
  const int64_t each = std::max<int64_t>(1, kReaders * max_runs / grads.bytes());
  const int64_t owned = std::min<int64_t>(kMaxOwned, beside * std::min(each, kReaders));
  launch(LaunchConfig{.grid = {ceil_div(max_runs, owned), lists}, .block = kEmbedThreads}, static_cast<int>(owned),
         static_cast<int>(first_list));
}

std::vector<Tensor> ngram_hash_embed_bwd_cuda(const Tensor& grad_out, const Tensor& tokens,
                                              const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
                                              const std::vector<int64_t>& ngram_sizes,
                                              const std::optional<std::vector<int64_t>>& functions,
                                              const std::optional<std::vector<int64_t>>& row_range,
                                              const std::vector<int64_t>& vocab, bool fused,
                                              std::optional<int64_t> alphabet) {
  const TableGrads grads(check_table_grads(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, functions,
                                           row_range, vocab, fused, alphabet));
  const Device device(grads.grad_out);
  std::vector<int64_t> sizes(grads.results(), 0);
  for (int64_t n = 0; n < grads.lists(); ++n) sizes[grads.result(n)] += grads.rows(n);
  std::vector<Tensor> result;
  for (const int64_t size : sizes) {
    result.push_back(device_output(grads.grad_out, {size, grads.width()}));
    device.zero(result.back());
  }
  if (grads.width() == 0 || grads.bytes() == 0) return result;
  const Tensor sorted = sort_readers(device, grads);
  const RunTensors found = find_runs(device, grads, sorted);
  with_readers(device, grads, sorted, [&]<class T>(Tag<T>, auto vec, const auto& readers) {
    TableRows<T> to = {};
    for (int64_t n = 0; n < grads.lists(); ++n)
      to.first[n] = device.write<T>(result[grads.result(n)]) + grads.first_row(n) * grads.width();
    const auto launch = [&](const LaunchConfig& config, int owned, int first_list) {
      const Runs runs = {device.read<u32>(found.starts), device.read<i32>(found.totals), owned};
      device.launch<ngram_hash_embed_bwd_kernel<T, vec()>>(config, readers, runs, first_list, to);
    };
    const int64_t hashed = grads.hashed_lists();
    launch_owners(grads, vec(), 0, hashed, std::min(grads.bytes(), grads.most_rows(hashed)), launch);
    if (grads.alphabet) launch_owners(grads, vec(), hashed, 1, std::min(grads.bytes(), grads.rows(hashed)), launch);
  });
  return result;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> ngram_hash_embed_sparse_bwd_cuda(
    const Tensor& grad_out, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, int64_t num_documents,
    const std::vector<int64_t>& ngram_sizes, const std::optional<std::vector<int64_t>>& functions,
    const std::optional<std::vector<int64_t>>& row_range, const std::vector<int64_t>& vocab, bool fused,
    std::optional<int64_t> alphabet) {
  const TableGrads grads(check_table_grads(grad_out, tokens, cu_seqlens, num_documents, ngram_sizes, functions,
                                           row_range, vocab, fused, alphabet));
  const Device device(grads.grad_out);
  const int64_t lists = grads.lists(), width = grads.width();
  const Tensor sorted = sort_readers(device, grads);
  const RunTensors found = find_runs(device, grads, sorted);
  // This copy waits for the device.
  const Tensor here = torch::stable::to(found.totals, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const std::vector<int32_t> runs(here.const_data_ptr<int32_t>(), here.const_data_ptr<int32_t>() + lists);
  std::vector<int64_t> sizes(grads.results(), 0), before(lists, 0);
  for (int64_t n = 0; n < lists; ++n) before[n] = sizes[grads.result(n)], sizes[grads.result(n)] += runs[n];
  std::vector<Tensor> rows, values;
  for (const int64_t size : sizes) {
    rows.push_back(device_output(grads.hash.tokens, {size}, ScalarType::Long));
    values.push_back(device_output(grads.grad_out, {size, width}));
  }
  with_readers(device, grads, sorted, [&]<class T>(Tag<T>, auto vec, const auto& readers) {
    SparseGrads<T> to = {};
    for (int64_t n = 0; n < lists; ++n) {
      to.first_rows[n] = grads.first_row(n);
      to.rows[n] = device.write<i64>(rows[grads.result(n)]) + before[n];
      to.values[n] = device.write<T>(values[grads.result(n)]) + before[n] * width;
    }
    const auto launch = [&](const LaunchConfig& config, int owned, int first_list) {
      const Runs owners = {device.read<u32>(found.starts), device.read<i32>(found.totals), owned};
      device.launch<ngram_hash_embed_sparse_bwd_kernel<T, vec()>>(config, readers, owners, first_list, to);
    };
    launch_owners(grads, vec(), 0, grads.hashed_lists(),
                  *std::max_element(runs.begin(), runs.begin() + grads.hashed_lists()), launch);
    if (grads.alphabet) launch_owners(grads, vec(), grads.hashed_lists(), 1, runs.back(), launch);
  });
  return {rows, values};
}

}  // namespace

BLT_KERNELS_IMPL(m) {
  m.impl("ngram_hash_fwd", BLT_KERNELS_BOX(&ngram_hash_fwd_cuda));
  m.impl("ngram_hash_embed_fwd", BLT_KERNELS_BOX(&ngram_hash_embed_fwd_cuda));
  m.impl("ngram_hash_embed_bwd", BLT_KERNELS_BOX(&ngram_hash_embed_bwd_cuda));
  m.impl("ngram_hash_embed_sparse_bwd", BLT_KERNELS_BOX(&ngram_hash_embed_sparse_bwd_cuda));
}

}  // namespace blt
