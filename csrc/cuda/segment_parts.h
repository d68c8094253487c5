// Launches the kernels that fold the parts of long segments (segment_fold.cuh), with their scratch memory.
#pragma once

#include <optional>

#include "row_launch.h"
#include "segment_fold.cuh"

namespace blt {

// Has an uninitialised row per part, written and read only where a patch is long. `data` is null without parts.
template <class T>
struct Scratch {
  std::optional<Tensor> memory;
  T* data = nullptr;
  Scratch(const Device& device, const Tensor& x, int64_t parts) {
    if (parts == 0) return;
    memory = device_output(x, {parts, x.size(1)}, sizeof(T) == sizeof(float) ? ScalarType::Float : x.scalar_type());
    data = device.write<T>(*memory);
  }
};

// Says which folds an op needs.
struct Asked {
  bool max = false, min = false, sum = false;
};

// Holds the folds of the whole parts of rows x, by levels.
template <class T>
class SegmentParts {
 public:
  SegmentParts(const Device& device, const Tensor& x, const Asked& asked)
      : count_(asked.max || asked.min || asked.sum ? x.size(0) / kPart : 0),
        second_count_(x.size(0) >= kSecondLevelBytes ? count_ / kPart : 0),
        width_(static_cast<i32>(x.size(1))),
        first_(device, x, count_, asked),
        second_(device, x, second_count_, asked) {}

  int64_t count() const { return count_; }
  PartLevels<T> levels() const { return {first_.folds(), second_.folds(), second_count_ > 0}; }

  // Folds level 1 from rows x, and level 2 from level 1.
  template <int kVec>
  void fold(const Device& device, const T* x, const i32* ids, i32 stride) const {
    launch<kVec>(device, x, ids, stride, count_);
    fold_second<kVec>(device, ids);
  }
  template <int kVec>
  void fold_second(const Device& device, const i32* ids) const {
    launch<kVec>(device, nullptr, ids, 0, second_count_);
  }

 private:
  struct Level {
    Scratch<T> max, min;
    Scratch<acc_t<T>> sum;
    Level(const Device& device, const Tensor& x, int64_t parts, const Asked& asked)
        : max(device, x, asked.max ? parts : 0),
          min(device, x, asked.min ? parts : 0),
          sum(device, x, asked.sum ? parts : 0) {}
    PartFolds<T> folds() const { return {max.data, min.data, sum.data}; }
  };

  template <int kVec>
  void launch(const Device& device, const T* x, const i32* ids, i32 stride, int64_t parts) const {
    const RowLaunch launch = row_launch(parts, width_, kVec);
    device.launch<segment_parts_kernel<T, kVec>>(launch.config, x, ids, parts, width_, stride, launch.tile, levels());
  }

  int64_t count_, second_count_;
  i32 width_;
  Level first_, second_;
};

}  // namespace blt
