// Polygons drawn as run-length masks on the CPU, to the pixel as pycocotools draws them (maskApi.c, rleFrPoly).
//
// Corners are rounded to fifths of a pixel. An edge is walked in these: along its longer axis a step each. Where the
// walk passes the middle of a column of pixels, the mask changes in that column, from the row on that it is in then.
// Sorted, these places are the ends of the runs. Several polygons of a mask are drawn one by one and joined.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "to_tensor.h"

namespace mrcnn {
namespace {

constexpr int64_t kFine = 5;          // steps in a pixel
constexpr double kFarthest = 1e6;     // pixels: the walk takes time in proportion to an outline

int64_t fine(double coordinate) {
  return static_cast<int64_t>(kFine * coordinate + 0.5);
}

// Draws outlines, one after the other: finds where each passes the middle of a column, as pixels counted down the
// columns.
class Outline {
 public:
  Outline(int64_t height, int64_t width) : height_(height), width_(width) {}

  // Appends the runs' ends of the polygon x1, y1, x2, y2, ...
  void draw(const double* begin, const double* end, std::vector<int32_t>& ends) {
    places_.clear();
    started_ = false;
    for (const double* corner = begin; corner != end; corner += 2) {
      const double* next = corner + 2 == end ? begin : corner + 2;
      edge(fine(corner[0]), fine(corner[1]), fine(next[0]), fine(next[1]));
    }
    std::sort(places_.begin(), places_.end());
    const size_t start = ends.size();
    for (const int32_t place : places_) {
      if (ends.size() > start && ends.back() == place) {  // where two changes fall together there is none
        ends.pop_back();
      } else {
        ends.push_back(place);
      }
    }
    const auto total = static_cast<int32_t>(height_ * width_);
    if (ends.size() == start || ends.back() != total) {
      ends.push_back(total);
    }
  }

 private:
  void edge(int64_t x0, int64_t y0, int64_t x1, int64_t y1) {
    const int64_t dx = std::abs(x1 - x0), dy = std::abs(y1 - y0), steps = std::max(dx, dy);
    const bool flat = dx >= dy, turned = flat ? x0 > x1 : y0 > y1;  // a line is the same from either end
    if (turned) {
      std::swap(x0, x1);
      std::swap(y0, y1);
    }
    const double slope = steps == 0 ? 0.0 : static_cast<double>(flat ? y1 - y0 : x1 - x0) / steps;
    for (int64_t i = 0; i <= steps; ++i) {
      const int64_t along = turned ? steps - i : i;
      const volatile double aside = slope * along;  // never fused with the sum, which would be rounded otherwise
      const auto across = static_cast<int64_t>((flat ? y0 : x0) + aside + 0.5);
      if (flat) {
        point(x0 + along, across);
      } else {
        point(across, y0 + along);
      }
    }
  }

  void point(int64_t x, int64_t y) {
    if (started_ && x != x_) {
      passed(x < x_ ? x : x - 1, std::min(y, y_));
    }
    started_ = true;
    x_ = x;
    y_ = y;
  }

  // From fine column x to the one after it, or back.
  void passed(int64_t x, int64_t y) {
    if (x < 0 || x % kFine != kFine / 2 || x / kFine >= width_) {
      return;
    }
    const double row = std::clamp(std::ceil((y + 0.5) / kFine - 0.5), 0.0, static_cast<double>(height_));
    places_.push_back(static_cast<int32_t>(x / kFine * height_ + static_cast<int64_t>(row)));
  }

  int64_t height_, width_, x_ = 0, y_ = 0;
  bool started_ = false;
  std::vector<int32_t> places_;
};

using Ones = std::pair<int32_t, int32_t>;  // the first pixel, and the one after the last

// Appends the runs' ends of what is in any of these.
void join(std::vector<Ones>& ones, int32_t total, std::vector<int32_t>& ends) {
  std::sort(ones.begin(), ones.end());
  const size_t start = ends.size();
  for (const auto& [begin, end] : ones) {
    if (ends.size() > start && begin <= ends.back()) {
      ends.back() = std::max(ends.back(), end);
    } else {
      ends.push_back(begin);
      ends.push_back(end);
    }
  }
  if (ends.size() == start || ends.back() != total) {
    ends.push_back(total);
  }
}

void check_draw_polygons_inputs(
    const Tensor& points, const Tensor& polygons, const Tensor& masks, int64_t height, int64_t width) {
  check(points.dim() == 2 && points.size(1) == 2 && points.scalar_type() == ScalarType::Double &&
            points.is_contiguous(),
        "draw_polygons: points must be (N, 2) float64");
  int64_t count = points.size(0);
  for (const Tensor* offsets : {&polygons, &masks}) {
    check(offsets->dim() == 1 && offsets->size(0) >= 1 && offsets->scalar_type() == ScalarType::Long &&
              offsets->is_contiguous(),
          "draw_polygons: offsets must be (P + 1,) and (I + 1,) int64");
    const auto* offset = static_cast<const int64_t*>(offsets->data_ptr());
    for (int64_t i = 0; i + 1 < offsets->size(0); ++i) {
      check(offset[i] >= 0 && offset[i] <= offset[i + 1] && offset[i + 1] <= count, "draw_polygons: offset ", i + 1,
            " is ", offset[i + 1], ", of ", count);
    }
    count = offsets->size(0) - 1;
  }
  check(height > 0 && width > 0 && height <= INT32_MAX / width, "draw_polygons: a mask of ", height, "x", width,
        " pixels has none, or more than 32 bits count");
  const auto* xy = static_cast<const double*>(points.data_ptr());
  for (int64_t i = 0; i < 2 * points.size(0); ++i) {
    check(std::abs(xy[i]) <= kFarthest, "draw_polygons: a coordinate is ", xy[i], ", the bound is ", kFarthest);
  }
}

std::tuple<Tensor, Tensor> draw_polygons_cpu(
    Tensor points, Tensor polygons, Tensor masks, int64_t height, int64_t width) {
  check_draw_polygons_inputs(points, polygons, masks, height, width);
  const auto* xy = static_cast<const double*>(points.data_ptr());
  const auto* polygon = static_cast<const int64_t*>(polygons.data_ptr());
  const auto* mask = static_cast<const int64_t*>(masks.data_ptr());
  Outline outline(height, width);
  std::vector<int32_t> drawn, one;
  std::vector<Ones> ones;
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i + 1 < masks.size(0); ++i) {
    if (mask[i + 1] - mask[i] == 1) {
      outline.draw(xy + 2 * polygon[mask[i]], xy + 2 * polygon[mask[i] + 1], drawn);
    } else if (mask[i + 1] > mask[i]) {
      ones.clear();
      for (int64_t p = mask[i]; p < mask[i + 1]; ++p) {
        one.clear();
        outline.draw(xy + 2 * polygon[p], xy + 2 * polygon[p + 1], one);
        for (size_t run = 1; run < one.size(); run += 2) {
          ones.emplace_back(one[run - 1], one[run]);
        }
      }
      join(ones, static_cast<int32_t>(height * width), drawn);
    }
    starts.push_back(static_cast<int64_t>(drawn.size()));
  }
  return {to_tensor(drawn, points, ScalarType::Int), to_tensor(starts, masks, ScalarType::Long)};
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("draw_polygons", TORCH_BOX(&mrcnn::draw_polygons_cpu));
}
