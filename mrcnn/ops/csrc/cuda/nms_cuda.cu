// Non-maximum suppression with CUDA: a block for each image, kChunk candidates at a time, best first. A chunk is
// compared with the boxes kept so far, then with itself, and what is left of it is kept. The block stops as soon as
// top_n boxes are kept. Nothing depends on a count that only the GPU knows, so the host never waits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../nms.h"
#include "launch.h"

namespace mrcnn {
namespace {

constexpr int kChunk = 64;  // candidates, a bit each
constexpr int kLanes = 8;   // threads that compare one candidate with the boxes kept so far
constexpr int kNmsThreads = kChunk * kLanes;

struct Candidate {
  Box box;
  float area;
  int64_t group;
};

// One image: its sorted candidates, and room for what is kept of them.
struct Image {
  const Box* boxes;
  const int64_t* groups;
  int64_t count;
  Box* kept_boxes;
  int64_t* kept_groups;
  int64_t* positions;
};

__device__ bool suppresses(const Box& kept, int64_t group, const Candidate& candidate, float bound) {
  return group == candidate.group && overlap(kept, area_of(kept), candidate.box, candidate.area, bound);
}

// Whether a lane finds a box that suppresses the candidate among its part of those kept so far.
__device__ bool suppressed(const Image& image, int64_t kept, const Candidate& candidate, int lane, float bound) {
  for (int64_t k = lane; k < kept; k += kLanes) {
    if (suppresses(image.kept_boxes[k], image.kept_groups[k], candidate, bound)) {
      return true;
    }
  }
  return false;
}

// A bit for each later candidate of the chunk that candidate c suppresses.
__device__ uint64_t suppressed_by(const Candidate* chunk, int c, int count, float bound) {
  uint64_t bits = 0;
  for (int k = c + 1; k < count; ++k) {
    if (suppresses(chunk[c].box, chunk[c].group, chunk[k], bound)) {
      bits |= uint64_t{1} << k;
    }
  }
  return bits;
}

// A bit for each candidate of the chunk that is left, given those alive after the boxes kept before.
__device__ uint64_t survivors(const uint64_t* rows, const int* dead, int count) {
  uint64_t alive = 0, left = 0;
  for (int c = 0; c < count; ++c) {
    alive |= dead[c] ? uint64_t{0} : uint64_t{1} << c;
  }
  for (int c = 0; c < count; ++c) {
    if (alive >> c & 1) {
      left |= uint64_t{1} << c;
      alive &= ~rows[c];
    }
  }
  return left;
}

__global__ void __launch_bounds__(kNmsThreads) kernel(
    const Box* boxes, const int64_t* groups, const int64_t* counts, int64_t candidates, float bound, int64_t top_n,
    Box* kept_boxes, int64_t* kept_groups, int64_t* positions) {
  __shared__ Candidate chunk[kChunk];
  __shared__ int dead[kChunk];
  __shared__ uint64_t rows[kChunk];
  __shared__ uint64_t left;
  const int64_t b = blockIdx.x;
  const Image image{boxes + b * candidates,  groups + b * candidates, counts[b] < candidates ? counts[b] : candidates,
                    kept_boxes + b * top_n, kept_groups + b * top_n, positions + b * top_n};
  const int c = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int64_t kept = 0;
  for (int64_t begin = 0; begin < image.count && kept < top_n; begin += kChunk) {
    const int count = static_cast<int>(image.count - begin < kChunk ? image.count - begin : kChunk);
    if (threadIdx.x < count) {
      const Box box = image.boxes[begin + threadIdx.x];
      chunk[threadIdx.x] = {box, area_of(box), image.groups[begin + threadIdx.x]};
      dead[threadIdx.x] = 0;
    }
    __syncthreads();  // the chunk is there, and so are the boxes kept of the one before
    if (c < count && suppressed(image, kept, chunk[c], lane, bound)) {
      dead[c] = 1;  // by several lanes, all the same
    }
    __syncthreads();
    if (threadIdx.x < count) {
      rows[threadIdx.x] = dead[threadIdx.x] ? 0 : suppressed_by(chunk, threadIdx.x, count, bound);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      left = survivors(rows, dead, count);
    }
    __syncthreads();
    if (threadIdx.x < count && left >> threadIdx.x & 1) {
      const int64_t slot = kept + __popcll(left & ((uint64_t{1} << threadIdx.x) - 1));
      if (slot < top_n) {
        image.kept_boxes[slot] = chunk[threadIdx.x].box;
        image.kept_groups[slot] = chunk[threadIdx.x].group;
        image.positions[slot] = begin + threadIdx.x;
      }
    }
    kept += __popcll(left);
    __syncthreads();  // chunk, dead and left have been read
  }
  for (int64_t slot = (kept < top_n ? kept : top_n) + threadIdx.x; slot < top_n; slot += kNmsThreads) {
    image.positions[slot] = -1;
  }
}

Tensor nms_cuda(Tensor boxes, Tensor groups, Tensor counts, double iou_threshold, int64_t top_n) {
  check_nms_inputs(boxes, groups, counts, top_n);
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  for (Tensor* tensor : {&boxes, &groups, &counts}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  const int64_t images = boxes.size(0);
  Tensor positions = torch::stable::new_empty(groups, {images, top_n});
  if (positions.numel() == 0) {
    return positions;
  }
  Tensor kept_boxes = torch::stable::new_empty(boxes, {images, top_n, 4});
  Tensor kept_groups = torch::stable::new_empty(groups, {images, top_n});
  kernel<<<static_cast<unsigned>(images), kNmsThreads, 0, current_stream(boxes)>>>(
      static_cast<const Box*>(boxes.data_ptr()), static_cast<const int64_t*>(groups.data_ptr()),
      static_cast<const int64_t*>(counts.data_ptr()), boxes.size(1), smallest_above(iou_threshold), top_n,
      static_cast<Box*>(kept_boxes.data_ptr()), static_cast<int64_t*>(kept_groups.data_ptr()),
      static_cast<int64_t*>(positions.data_ptr()));
  check_launch("nms");
  return positions;
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CUDA, m) {
  m.impl("nms", TORCH_BOX(&mrcnn::nms_cuda));
}
