// Computes block_causal_attention, forward and backward, for short documents: up to kShort queries and keys.
//
// Tiling. Tiles of kWidth queries would multiply many masked pairs, and few queries of one head fill few lanes. So here
// a lane has a problem, which is a document and a head, and a group has as many problems of one shape as a vector has
// lanes, from neighbouring documents of that shape. A table holds a number of each problem for every pair
// (head_tiles.h): the softmax is vertical, and masked pairs are left out, but for those between rows that are
// multiplied together. Threads get runs of groups. A group of the backward pass has a head of keys, and goes through
// the query heads that read it. The lanes do not meet, so the results of a document depend on nothing but the document.
//
// Backward sums the softmax anew, so lse and its rounding play no part, and neither does out.
//
// Bytes: forward reads q, k and v and writes out once; backward reads q, k, v and grad_out and writes the gradients
// once. Flops for a pair that attends: 4 E forward, 10 E backward. With 5 queries in fp32 that is one flop a byte, so
// memory is the limit.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "blocks.h"

namespace blt {

inline constexpr int64_t kShort = 16;

// Has the documents with up to kShort queries and used keys, by shape, and where the others are.
class ShortDocuments {
 public:
  struct Shape {
    int64_t queries, keys;  // counts the used keys
    std::vector<int64_t> documents;
  };
  explicit ShortDocuments(const KeyRanges& ranges);
  const std::vector<Shape>& shapes() const { return shapes_; }
  // Returns runs of consecutive documents, none of which are short.
  const std::vector<Range>& others() const { return others_; }

 private:
  std::vector<Shape> shapes_;
  std::vector<Range> others_;
};

// Computes out and lse [Tq, H] of short documents.
template <class A>
void attend_short(const torch::stable::Tensor& like, const Problem& problem, const OutputHeads& out, A* lse,
                  const ShortDocuments& documents);

struct Gradients {
  Heads out;
  OutputHeads q, k, v;
};

// Computes the gradients of short documents.
template <class A>
void propagate_short(const torch::stable::Tensor& like, const Problem& problem, const Gradients& grads,
                     const ShortDocuments& documents);

}  // namespace blt
