// Non-maximum suppression on the CPU: a thread for each image, a candidate after the other, best first. A candidate is
// compared with the boxes kept so far in its group, kBlock of them at once. The order of all candidates is that of
// their scores, whatever their group, so the image is done as soon as top_n of them are kept.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "../check.h"
#include "../nms.h"
#include "simd.h"

namespace mrcnn {
namespace {

constexpr size_t kBlock = 16;

// The boxes kept in one group, coordinate by coordinate, filled up to whole blocks with boxes that overlap nothing.
struct Kept {
  std::vector<float> x1, y1, x2, y2, area;
  size_t count = 0;

  void add(const Box& box) {
    if (count == x1.size()) {
      const float infinity = std::numeric_limits<float>::infinity();
      for (auto* low : {&x1, &y1}) {
        low->resize(count + kBlock, infinity);
      }
      for (auto* high : {&x2, &y2}) {
        high->resize(count + kBlock, -infinity);
      }
      area.resize(count + kBlock, 0.0f);
    }
    x1[count] = box.x1;
    y1[count] = box.y1;
    x2[count] = box.x2;
    y2[count] = box.y2;
    area[count++] = area_of(box);
  }
};

MRCNN_INLINE bool overlaps_any(const Kept& kept, const Box& box, float bound) {
  const float area = area_of(box);
  for (size_t begin = 0; begin < kept.count; begin += kBlock) {
    int hits = 0;
    for (size_t k = begin; k < begin + kBlock; ++k) {
      hits |= overlap({kept.x1[k], kept.y1[k], kept.x2[k], kept.y2[k]}, kept.area[k], box, area, bound);
    }
    if (hits != 0) {
      return true;
    }
  }
  return false;
}

MRCNN_AVX2_EXACT bool overlaps_any_avx2(const Kept& kept, const Box& box, float bound) {
  return overlaps_any(kept, box, bound);
}

bool overlaps_any_baseline(const Kept& kept, const Box& box, float bound) {
  return overlaps_any(kept, box, bound);
}

// positions[0, top_n): the kept ones of `count` sorted candidates, -1 after the last.
void suppress(
    const Box* boxes, const int64_t* groups, int64_t count, float bound, int64_t top_n, int64_t* positions) {
  const auto overlaps = has_avx2() ? overlaps_any_avx2 : overlaps_any_baseline;
  std::unordered_map<int64_t, Kept> kept_of;
  int64_t found = 0;
  for (int64_t i = 0; i < count && found < top_n; ++i) {
    Kept& kept = kept_of[groups[i]];
    if (!overlaps(kept, boxes[i], bound)) {
      kept.add(boxes[i]);
      positions[found++] = i;
    }
  }
  std::fill(positions + found, positions + top_n, -1);
}

Tensor nms_cpu(Tensor boxes, Tensor groups, Tensor counts, double iou_threshold, int64_t top_n) {
  check_nms_inputs(boxes, groups, counts, top_n);
  boxes = torch::stable::contiguous(boxes);
  groups = torch::stable::contiguous(groups);
  counts = torch::stable::contiguous(counts);
  const int64_t images = boxes.size(0), candidates = boxes.size(1);
  const auto* box = static_cast<const Box*>(boxes.data_ptr());
  const auto* group = static_cast<const int64_t*>(groups.data_ptr());
  const auto* count = static_cast<const int64_t*>(counts.data_ptr());
  Tensor positions = torch::stable::new_empty(groups, {images, top_n});
  auto* position = static_cast<int64_t*>(positions.data_ptr());
  const float bound = smallest_above(iou_threshold);
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t some = std::clamp<int64_t>(count[b], 0, candidates);
      suppress(box + b * candidates, group + b * candidates, some, bound, top_n, position + b * top_n);
    }
  });
  return positions;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("nms", TORCH_BOX(&mrcnn::nms_cpu));
}
