// When one box suppresses another. Shared by the CPU and the CUDA kernels, in torchvision's arithmetic.

#pragma once

#include <cmath>
#include <limits>

#include "sampling.h"

namespace mrcnn {

struct Box {
  float x1, y1, x2, y2;
};

MRCNN_HOST_DEVICE float area_of(const Box& box) {
  return times(box.x2 - box.x1, box.y2 - box.y1);
}

// False where the IoU is NaN, as that of two boxes without area.
MRCNN_HOST_DEVICE bool overlap(const Box& a, float a_area, const Box& b, float b_area, float bound) {
  const float left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
  const float top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
  const float width = right - left > 0.0f ? right - left : 0.0f;
  const float height = bottom - top > 0.0f ? bottom - top : 0.0f;
  const float shared = times(width, height);
  return shared / (a_area + b_area - shared) >= bound;
}

// The least float above a threshold: for a float x, `x >= smallest_above(t)` says what `x > t` says in double.
inline float smallest_above(double threshold) {
  const float nearest = static_cast<float>(threshold);
  const bool above = static_cast<double>(nearest) > threshold;
  return above ? nearest : std::nextafter(nearest, std::numeric_limits<float>::infinity());
}

}  // namespace mrcnn
