// Antialiased bilinear resizing of run-length masks on the CPU.
//
// A pixel of the result covers source pixels with the weights of a triangle: wx of columns times wy of rows. A column
// of the result sees its source columns as steps down the rows: where a run begins or ends in one of them, coverage
// changes by that column's wx. Between the rows that a step reaches, nothing changes: the work is that of the runs and
// of the outline, not of the pixels. Coverage is rounded to 255ths between the two axes, as it is where an 8-bit image
// of the mask is resized, columns first: so both set the same pixels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../check.h"
#include "to_tensor.h"

namespace mrcnn {
namespace {

constexpr double kHalf = 127.5 - 1e-6;  // of 255; a pixel covered by just half is set, however its weights were rounded

// Which pixels of `before` a pixel of `after` covers along one axis, and with which weights.
struct ResizeAxis {
  int64_t before, after;
  std::vector<int64_t> low, high;             // of pixel i: [low, high)
  std::vector<double> weight;                 // of pixel i, source pixel low + k: weight[i * taps + k]
  std::vector<double> tail;                   // the weight of low + k and all after it, tail[i * (taps + 1) + k]
  std::vector<int64_t> first_above;           // of source pixel y: the first i with high > y
  int64_t taps;

  ResizeAxis(int64_t before_, int64_t after_) : before(before_), after(after_), low(after_), high(after_) {
    const double scale = static_cast<double>(before) / after, support = std::max(scale, 1.0);
    taps = static_cast<int64_t>(std::ceil(2 * support)) + 1;
    weight.resize(after * taps);
    tail.resize(after * (taps + 1));
    for (int64_t i = 0; i < after; ++i) {
      const double centre = (i + 0.5) * scale;
      low[i] = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
      high[i] = std::min<int64_t>({static_cast<int64_t>(centre + support + 0.5), before, low[i] + taps});
      set_weights(i, centre, support);
    }
    first_above.resize(before);
    for (int64_t y = 0, i = 0; y < before; ++y) {
      while (i < after && high[i] <= y) {
        ++i;
      }
      first_above[y] = i;
    }
  }

  // The weight of the source pixels from y on in pixel i.
  double from(int64_t i, int64_t y) const {
    return y <= low[i] ? 1.0 : y >= high[i] ? 0.0 : tail[i * (taps + 1) + y - low[i]];
  }

 private:
  void set_weights(int64_t i, double centre, double support) {
    double* w = &weight[i * taps];
    double sum = 0;
    for (int64_t k = 0; k < high[i] - low[i]; ++k) {
      w[k] = std::max(1 - std::abs((low[i] + k + 0.5 - centre) / support), 0.0);
      sum += w[k];
    }
    for (int64_t k = high[i] - low[i] - 1; k >= 0; --k) {
      w[k] /= sum;
      tail[i * (taps + 1) + k] = tail[i * (taps + 1) + k + 1] + w[k];
    }
  }
};

// The runs of one mask, looked up by column.
class MaskColumns {
 public:
  MaskColumns(const int32_t* begin, const int32_t* end, int64_t height) : begin_(begin), end_(end), height_(height) {
    first = end - begin > 1 ? begin[0] / height : 0;
    const int64_t last = end - begin > 1 ? begin[(end - begin) / 2 * 2 - 1] - 1 : -1;
    beyond = end - begin > 1 ? last / height + 1 : 0;
    const int32_t* at = begin;
    for (int64_t x = first; x < beyond; ++x) {
      at = std::upper_bound(at, std::min(at + 64, end), static_cast<int32_t>(x * height));
      if (at != end && *at <= x * height) {
        at = std::upper_bound(at, end, static_cast<int32_t>(x * height));
      }
      start_.push_back(at);
    }
  }

  int64_t first, beyond;  // columns outside are empty

  // Calls step(row, +1 or -1) where a run of ones begins or ends in column x.
  template <typename Step>
  void steps(int64_t x, const Step& step) const {
    const int64_t top = x * height_, bottom = top + height_;
    int64_t from = top;
    for (const int32_t* run = start_[x - first]; from < bottom && run != end_; ++run) {
      const int64_t to = std::min<int64_t>(*run, bottom);
      if ((run - begin_) % 2 == 1 && to > from) {
        step(from - top, 1);
        step(to - top, -1);
      }
      from = to;
    }
  }

 private:
  const int32_t *begin_, *end_;
  int64_t height_;
  std::vector<const int32_t*> start_;
};

// Where coverage changes from one row to the next, and by how many 255ths.
struct Step {
  int64_t row;
  double change;
};

// Sorts steps by row, and rounds what they come to.
void settle(std::vector<Step>& steps) {
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.row < b.row; });
  double exact = 0, rounded = 0;
  for (Step& step : steps) {
    exact += step.change;
    step.change = std::floor(exact + 0.5 + 1e-6) - rounded;
    rounded += step.change;
  }
}

// The runs of the result, written pixel by pixel or stretch by stretch.
class RunWriter {
 public:
  explicit RunWriter(std::vector<int32_t>& ends) : ends_(ends), start_(ends.size()) {}

  // Pixels from `at` on are `set`, until told otherwise.
  void from(int64_t at, bool set) {
    if (set == set_) {
      return;
    }
    if (ends_.size() > start_ && ends_.back() == at) {  // nothing was written since: the run before goes on
      ends_.pop_back();
    } else {
      ends_.push_back(static_cast<int32_t>(at));
    }
    set_ = set;
  }

 private:
  std::vector<int32_t>& ends_;
  size_t start_;
  bool set_ = false;
};

// One column of the result: sorted steps -> runs from pixel `at` on.
void write_column(const std::vector<Step>& steps, const ResizeAxis& rows, int64_t at, RunWriter& runs) {
  double reached = 0;  // coverage by the steps that lie wholly before the row
  size_t next = 0;
  for (int64_t y = steps.empty() ? rows.after : rows.first_above[steps[0].row]; y < rows.after;) {
    while (next < steps.size() && steps[next].row <= rows.low[y]) {
      reached += steps[next++].change;
    }
    double covered = reached;
    for (size_t s = next; s < steps.size() && steps[s].row < rows.high[y]; ++s) {
      covered += steps[s].change * rows.from(y, steps[s].row);
    }
    runs.from(at + y, covered >= kHalf);
    const bool nothing_near = next == steps.size() || steps[next].row >= rows.high[y];
    if (!nothing_near) {
      ++y;
    } else if (next == steps.size() || steps[next].row >= rows.before) {
      break;
    } else {
      y = std::max(rows.first_above[steps[next].row], y + 1);
    }
  }
}

void resize_mask(
    const int32_t* begin, const int32_t* end, const ResizeAxis& rows, const ResizeAxis& columns,
    std::vector<int32_t>& ends) {
  const MaskColumns mask(begin, end, rows.before);
  RunWriter runs(ends);
  std::vector<Step> steps;
  int64_t x = mask.first < mask.beyond ? columns.first_above[mask.first] : columns.after;
  for (; x < columns.after && columns.low[x] < mask.beyond; ++x) {
    steps.clear();
    const int64_t low = std::max(columns.low[x], mask.first), high = std::min(columns.high[x], mask.beyond);
    for (int64_t from = low; from < high; ++from) {
      const double weight = columns.weight[x * columns.taps + from - columns.low[x]];
      mask.steps(from, [&](int64_t row, int sign) { steps.push_back({row, sign * 255 * weight}); });
    }
    settle(steps);
    runs.from(x * rows.after, false);
    write_column(steps, rows, x * rows.after, runs);
  }
  if (x < columns.after) {
    runs.from(x * rows.after, false);
  }
  ends.push_back(static_cast<int32_t>(rows.after * columns.after));
}

void check_resize_masks_inputs(
    const Tensor& ends, const Tensor& offsets, int64_t height, int64_t width, int64_t new_height, int64_t new_width) {
  check(ends.dim() == 1 && ends.scalar_type() == ScalarType::Int, "resize_masks: ends must be (T,) int32");
  check(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.scalar_type() == ScalarType::Long,
        "resize_masks: offsets must be (I + 1,) int64");
  for (const auto& [rows, columns] : {std::pair(height, width), std::pair(new_height, new_width)}) {
    check(rows > 0 && columns > 0 && rows <= INT32_MAX / columns, "resize_masks: a mask of ", rows, "x", columns,
          " pixels has none, or more than 32 bits count");
  }
}

std::tuple<Tensor, Tensor> resize_masks_cpu(
    Tensor ends, Tensor offsets, int64_t height, int64_t width, int64_t new_height, int64_t new_width) {
  check_resize_masks_inputs(ends, offsets, height, width, new_height, new_width);
  ends = torch::stable::contiguous(ends);
  offsets = torch::stable::contiguous(offsets);
  const auto* end = static_cast<const int32_t*>(ends.data_ptr());
  const auto* offset = static_cast<const int64_t*>(offsets.data_ptr());
  const ResizeAxis rows(height, new_height), columns(width, new_width);

  std::vector<int32_t> resized;
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i + 1 < offsets.size(0); ++i) {
    check(offset[i] >= 0 && offset[i] <= offset[i + 1] && offset[i + 1] <= ends.size(0),
          "resize_masks: offsets of mask ", i, " do not lie in its ", ends.size(0), " runs");
    const int32_t *first = end + offset[i], *last = end + offset[i + 1];
    check(first == last || (*first >= 0 && last[-1] == height * width && std::is_sorted(first, last)),
          "resize_masks: the runs of mask ", i, " do not fill ", height, "x", width, " pixels");
    if (first != last) {
      resize_mask(first, last, rows, columns, resized);
    }
    starts.push_back(static_cast<int64_t>(resized.size()));
  }
  return {to_tensor(resized, ends, ScalarType::Int), to_tensor(starts, offsets, ScalarType::Long)};
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("resize_masks", TORCH_BOX(&mrcnn::resize_masks_cpu));
}
