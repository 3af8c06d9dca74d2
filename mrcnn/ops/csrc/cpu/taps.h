// The sampling weights of many RoIs along one axis, merged and flattened, so that a kernel's inner loops only
// multiply and add.

#pragma once

#include <algorithm>
#include <vector>

#include "../precise.h"
#include "../sampling.h"

namespace mrcnn {

// The pixels [low, low + count) of the map that a RoI reads along one axis.
struct Window {
  int64_t low;
  int64_t count;
};

// From low up to high, on to a multiple of `multiple` pixels wherever the map of `size` is wide enough: loops without
// a remainder.
inline Window window_of(int64_t low, int64_t high, int64_t size, int64_t multiple) {
  const int64_t count = std::max<int64_t>(0, high - low);
  const int64_t rounded = (count + multiple - 1) / multiple * multiple;
  return rounded <= size ? Window{std::min(low, size - rounded), rounded} : Window{low, count};
}

// Wy or Wx of sampling.h, without most of its zeros. All bins of a RoI have as many taps (weight 0 fills up), because
// a loop whose length keeps changing costs more than a few idle multiplications.
struct RoiTaps {
  int64_t low;     // the RoI reads the pixels [low, low + count) of the map, none if count is 0
  int64_t count;
  int64_t taps;    // of a bin
  int64_t offset;  // where they start: bin p's tap k is at offset + p * taps + k
};

template <typename T>
class Taps {
 public:
  const int64_t bins;
  std::vector<RoiTaps> rois;

  // Wherever the map is wide enough, a RoI's count is rounded up to a multiple of `multiple`.
  explicit Taps(int64_t bins, int64_t multiple = 1) : bins(bins), multiple_(multiple), index_(bins), weight_(bins) {}

  // Pixels of the RoI's taps, counted from its low.
  const int32_t* index(const RoiTaps& roi) const {
    return indices_.data() + roi.offset;
  }

  const T* weight(const RoiTaps& roi) const {
    return weights_.data() + roi.offset;
  }

  void add_roi(const Axis<T>& axis) {
    int64_t low = axis.size, high = 0, taps = 0;
    for (int64_t p = 0; p < bins; ++p) {
      collect_bin(axis, p);
      if (!index_[p].empty()) {
        low = std::min<int64_t>(low, index_[p].front());
        high = std::max<int64_t>(high, index_[p].back() + 1);
        taps = std::max<int64_t>(taps, static_cast<int64_t>(index_[p].size()));
      }
    }
    const Window window = window_of(low, high, axis.size, multiple_);
    rois.push_back({window.low, window.count, taps, static_cast<int64_t>(indices_.size())});
    append_bins(rois.back());
  }

 private:
  int64_t multiple_;
  std::vector<int32_t> indices_;
  std::vector<T> weights_;
  std::vector<std::vector<int32_t>> index_;  // of the RoI being added, bin by bin, sorted
  std::vector<std::vector<T>> weight_;

  void collect_bin(const Axis<T>& axis, int64_t p) {
    index_[p].clear();
    weight_[p].clear();
    if (axis.rule == Rule::kPrecise) {
      return collect_hats(axis, p);
    }
    const T mean = axis.grid > 0 ? T(1) / static_cast<T>(axis.grid) : T(0);
    int64_t first, last;
    sample_range(axis, p, first, last);
    Sample<T> sample;
    for (int64_t i = first; i < last; ++i) {
      if (sample_at(axis, p, i, sample)) {
        add_tap(p, sample.low, sample.low_weight * mean);
        add_tap(p, sample.high, sample.high_weight * mean);
      }
    }
  }

  void collect_hats(const Axis<T>& axis, int64_t p) {
    int64_t first, last;
    hats_of_bin(axis, p, first, last);
    for (int64_t pixel = first; pixel < last; ++pixel) {
      add_tap(p, pixel, hat_weights(axis, p, pixel).mean);
    }
  }

  // Neighbouring samples share pixels, and those of a reversed RoI go backwards.
  void add_tap(int64_t p, int64_t pixel, T value) {
    if (value == T(0)) {
      return;
    }
    auto& index = index_[p];
    const auto at = std::lower_bound(index.begin(), index.end(), static_cast<int32_t>(pixel));
    const auto slot = at - index.begin();
    if (at != index.end() && *at == pixel) {
      weight_[p][slot] += value;
    } else {
      index.insert(at, static_cast<int32_t>(pixel));
      weight_[p].insert(weight_[p].begin() + slot, value);
    }
  }

  void append_bins(const RoiTaps& roi) {
    for (int64_t p = 0; p < bins; ++p) {
      const int64_t used = static_cast<int64_t>(index_[p].size());
      for (int64_t k = 0; k < roi.taps; ++k) {
        indices_.push_back(used == 0 ? 0 : index_[p][std::min(k, used - 1)] - static_cast<int32_t>(roi.low));
        weights_.push_back(k < used ? weight_[p][k] : T(0));
      }
    }
  }
};

}  // namespace mrcnn
