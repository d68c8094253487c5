// boundary_patch divides documents into patches at marks of bytes.
//
// The first pass turns marks into decisions about the byte after each byte; where marks are such decisions already, it
// is left out. The second pass builds the layout (patch_layout.h). The loops of the first have no branch, so the
// compiler vectorises them.
// Bytes moved: 1 to 8 read per mark, 1 per decision, 8 per byte and 8 per patch for the layout.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <string>

#include "../common/args/boundary_patch.h"
#include "../common/box.h"
#include "../common/dispatch.h"
#include "patch_layout.h"

namespace blt {
namespace {

// marked(b, t) says whether byte t of document b is marked.
template <class Marked>
Tensor decisions_of_marks(const TextDocuments& text, const BoundaryArguments& arguments, const Marked& marked) {
  return decisions_of(text, arguments.marks.size(0), [&](int64_t b, int64_t begin, int64_t end, bool* starts_after) {
    const int64_t first = std::min(arguments.first, end - begin + 1);
    const int64_t fixed = std::min(begin + first, end);  // bytes whose decision is `first`
    for (int64_t t = begin; t < fixed; ++t) starts_after[t] = t + 1 == begin + first;
    if (!arguments.at_start) {
      for (int64_t t = fixed; t < end; ++t) starts_after[t] = marked(b, t);
    } else if (fixed < end) {
      for (int64_t t = fixed; t < end - 1; ++t) starts_after[t] = marked(b, t + 1);
      starts_after[end - 1] = false;
    }
  });
}

LayoutTensors boundary_patch_fwd_cpu(const Tensor& marks, const std::optional<Tensor>& cu_seqlens,
                                     int64_t num_documents, std::optional<double> threshold,
                                     const std::optional<Tensor>& thresholds, std::string at,
                                     std::optional<int64_t> first, std::optional<int64_t> max_patches) {
  const int64_t documents = cu_seqlens ? std::max<int64_t>(cu_seqlens->numel() - 1, 0) : num_documents;
  const BoundaryArguments arguments = check_boundary_patch(marks, documents, threshold, thresholds, at, first);
  const int64_t bytes = arguments.marks.size(0);
  const TextDocuments text(cu_seqlens, num_documents, arguments.marks, bytes);
  Tensor decisions = arguments.marks;
  if (arguments.marks.scalar_type() == ScalarType::Bool) {
    const bool* const mark = arguments.marks.const_data_ptr<bool>();
    if (arguments.at_start || arguments.first > 0)
      decisions = decisions_of_marks(text, arguments, [=](int64_t, int64_t t) { return mark[t]; });
  } else {
    const float* const limits = arguments.thresholds ? arguments.thresholds->const_data_ptr<float>() : nullptr;
    const float limit = static_cast<float>(threshold.value_or(0));
    dispatch_float(arguments.marks.scalar_type(), "marks", [&]<class T>(Tag<T>) {
      const T* const score = arguments.marks.const_data_ptr<T>();
      decisions = decisions_of_marks(text, arguments, [=](int64_t b, int64_t t) {
        return static_cast<float>(score[t]) > (limits == nullptr ? limit : limits[b]);
      });
    });
  }
  const bool* const starts_after = decisions.const_data_ptr<bool>();
  return build_layout(text, bytes, max_patches, [=](int64_t t, int64_t) { return starts_after[t]; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("boundary_patch_fwd", BLT_KERNELS_BOX(&boundary_patch_fwd_cpu));
}

}  // namespace blt
