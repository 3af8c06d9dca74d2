// What a maximum chooses from, for many RoIs along one axis, flattened.

#pragma once

#include <algorithm>
#include <vector>

#include "../sampling.h"
#include "taps.h"

namespace mrcnn {

// One interpolation between pixels of the RoI's window, counted from its low. A sample that is off the map has its low
// and high at the window's count: beyond the end, where a strip holds a zero.
template <typename T>
struct WindowSample {
  int32_t low;
  int32_t high;
  T low_weight;
  T high_weight;
};

struct RoiSamples {
  int64_t low;    // the RoI reads the pixels [low, low + count) of the map, none if count is 0
  int64_t count;
  int64_t bins;   // where its bins start
};

template <typename T>
struct BinSamples {
  const WindowSample<T>* sample;
  int64_t count;
};

template <typename T>
class Samples {
 public:
  const int64_t bins;
  std::vector<RoiSamples> rois;

  // Wherever the map is wide enough, a RoI's count is rounded up to a multiple of `multiple`.
  explicit Samples(int64_t bins, int64_t multiple = 1) : bins(bins), multiple_(multiple), begins_(1, 0) {}

  BinSamples<T> bin(const RoiSamples& roi, int64_t p) const {
    const int64_t begin = begins_[roi.bins + p];
    return {samples_.data() + begin, begins_[roi.bins + p + 1] - begin};
  }

  void add_roi(const Axis<T>& axis) {
    const size_t before = samples_.size();
    const int64_t first_bin = static_cast<int64_t>(begins_.size()) - 1;
    int64_t low = axis.size, high = 0;
    for (int64_t p = 0; p < bins; ++p) {
      collect_bin(axis, p, low, high);
      begins_.push_back(static_cast<int64_t>(samples_.size()));
    }
    const Window window = window_of(low, high, axis.size, multiple_);
    rois.push_back({window.low, window.count, first_bin});
    for (size_t i = before; i < samples_.size(); ++i) {
      WindowSample<T>& sample = samples_[i];
      const bool off = sample.low < 0;
      sample.low = static_cast<int32_t>(off ? window.count : sample.low - window.low);
      sample.high = static_cast<int32_t>(off ? window.count : sample.high - window.low);
    }
  }

 private:
  int64_t multiple_;
  std::vector<WindowSample<T>> samples_;
  std::vector<int64_t> begins_;  // of every bin's samples, and one past the last

  void collect_bin(const Axis<T>& axis, int64_t p, int64_t& low, int64_t& high) {
    int64_t first, last;
    candidate_range(axis, p, first, last);
    Sample<T> sample;
    for (int64_t i = first; i < last; ++i) {
      if (candidate_at(axis, p, i, sample)) {
        low = std::min(low, sample.low);
        high = std::max(high, sample.high + 1);
        samples_.push_back({static_cast<int32_t>(sample.low), static_cast<int32_t>(sample.high), sample.low_weight,
                            sample.high_weight});
      } else {
        samples_.push_back({-1, -1, T(1), T(0)});
      }
    }
  }
};

// The samples of a row of bins side by side, so that a vector holds sample k of several bins. A bin that has fewer than
// the others repeats its last, which changes no maximum.
template <typename T>
struct Lanes {
  int64_t count = 0;    // bins, rounded up to whole vectors
  int64_t samples = 0;  // of the bin that has most
  std::vector<int32_t> low, high;  // [k * count + q]
  std::vector<T> low_weight, high_weight;
  std::vector<int32_t> in_bin;  // samples of bin q

  Lanes(const Samples<T>& table, const RoiSamples& roi, int64_t multiple)
      : count((table.bins + multiple - 1) / multiple * multiple), in_bin(count, 0) {
    for (int64_t q = 0; q < table.bins; ++q) {
      in_bin[q] = static_cast<int32_t>(table.bin(roi, q).count);
      samples = std::max<int64_t>(samples, in_bin[q]);
    }
    low.resize(samples * count);
    high.resize(samples * count);
    low_weight.resize(samples * count);
    high_weight.resize(samples * count);
    for (int64_t q = 0; q < table.bins; ++q) {
      for (int64_t k = 0; in_bin[q] > 0 && k < samples; ++k) {
        const WindowSample<T>& sample = table.bin(roi, q).sample[std::min<int64_t>(k, in_bin[q] - 1)];
        low[k * count + q] = sample.low;
        high[k * count + q] = sample.high;
        low_weight[k * count + q] = sample.low_weight;
        high_weight[k * count + q] = sample.high_weight;
      }
    }
  }
};

}  // namespace mrcnn
