// Bilinear enlarging of 8-bit RGB images on the CPU.
//
// Columns first, then rows, each rounded to 8 bits, as Pillow does it. A pixel of the result lies between two of the
// source: a + (b - a) * weight, the weight in 32768ths. All is done in integers of 16 bits: every processor makes the
// same bytes, and a vector holds many of them. Columns of a source row are made when the first row that needs them is
// and are kept for the next one: two rows, which stay in the nearest cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../check.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace mrcnn {
namespace {

constexpr int kOne = 32768;        // a whole, in weights
constexpr int64_t kTogether = 4;   // pixels that are made at once: from no more than five of the source
constexpr int64_t kWindow = 16;    // bytes that hold those
constexpr int64_t kSlack = 16;     // bytes that may be written behind a row
constexpr int64_t kRowsAhead = 2;  // of the result, whose memory is fetched: as a file's, no cache has it yet
constexpr int64_t kCacheLine = 64;
constexpr int8_t kNothing = -128;  // a place from which a vector takes 0, also where 3 is added

MRCNN_INLINE uint8_t between(int a, int b, int weight) {
  return static_cast<uint8_t>(a + (((b - a) * weight + kOne / 2) >> 15));
}

// The source pixel before each pixel of the result along one axis, and the weight of the one after it.
struct EnlargedAxis {
  std::vector<int64_t> before;
  std::vector<int16_t> weight;

  EnlargedAxis(int64_t size, int64_t new_size) : before(new_size), weight(new_size) {
    for (int64_t i = 0; i < new_size; ++i) {
      const double place = (i + 0.5) * size / new_size - 0.5, low = std::floor(place);
      const bool inside = low >= 0 && low < size - 1;  // else there is no pixel on one side
      before[i] = std::clamp<int64_t>(static_cast<int64_t>(low), 0, size - 1);
      weight[i] = inside ? static_cast<int16_t>(std::min((place - low) * kOne + 0.5, kOne - 1.0)) : 0;
    }
  }
};

// The columns of a row, in blocks of kTogether pixels.
struct Columns {
  int64_t width;
  std::vector<int64_t> at;      // of a block: its first source byte
  std::vector<int8_t> before;   // of each of its samples: the place of the source's, counted from there. As they lie in
                                // a vector of 16 bits a sample: two pixels take six of eight, the rest is nothing
  std::vector<int16_t> weight;  // of each of its samples

  explicit Columns(const EnlargedAxis& axis)
      : width(static_cast<int64_t>(axis.before.size())), at((width + kTogether - 1) / kTogether),
        before(at.size() * 32, kNothing), weight(at.size() * 16) {
    for (int64_t x = 0; x < static_cast<int64_t>(at.size()) * kTogether; ++x) {
      const int64_t pixel = std::min(x, width - 1), block = x / kTogether, first = block * kTogether;
      at[block] = 3 * axis.before[first];
      for (int64_t channel = 0; channel < 3; ++channel) {
        const int64_t sample = block * 16 + (x - first) / 2 * 8 + x % 2 * 3 + channel;
        before[2 * sample] = static_cast<int8_t>(3 * axis.before[pixel] - at[block] + channel);
        weight[sample] = axis.weight[pixel];
      }
    }
  }

  // Bytes of a row of the result, with what may be written behind it.
  int64_t room() const {
    return static_cast<int64_t>(at.size()) * kTogether * 3 + kSlack;
  }
};

void enlarge_columns(const uint8_t* row, const Columns& columns, uint8_t* out) {
  for (size_t block = 0; block < columns.at.size(); ++block) {
    const uint8_t* window = row + columns.at[block];
    for (int half = 0; half < 2; ++half) {
      const int8_t* before = &columns.before[block * 32 + half * 16];
      const int16_t* weight = &columns.weight[block * 16 + half * 8];
      for (int i = 0; i < 6; ++i) {
        *out++ = between(window[before[2 * i]], window[before[2 * i] + 3], weight[i]);
      }
    }
  }
}

void enlarge_rows(const uint8_t* above, const uint8_t* below, int16_t weight, uint8_t* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = between(above[i], below[i], weight);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

MRCNN_AVX2 inline __m256i between(__m256i a, __m256i b, __m256i weight) {
  return _mm256_add_epi16(a, _mm256_mulhrs_epi16(_mm256_sub_epi16(b, a), weight));
}

MRCNN_AVX2 void enlarge_columns_avx2(const uint8_t* row, const Columns& columns, uint8_t* out) {
  const __m256i pixel = _mm256_set1_epi8(3);
  // in variables: what is written to could, for all the compiler knows, be the vectors themselves
  const int64_t *at = columns.at.data(), *end = at + columns.at.size();
  const auto* before_of = reinterpret_cast<const __m256i*>(columns.before.data());
  const auto* weight_of = reinterpret_cast<const __m256i*>(columns.weight.data());
  for (; at != end; ++at, ++before_of, ++weight_of, out += kTogether * 3) {
    const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + *at));
    const __m256i source = _mm256_broadcastsi128_si256(window);
    const __m256i before = _mm256_loadu_si256(before_of);
    const __m256i after = _mm256_add_epi8(before, pixel);
    const __m256i weight = _mm256_loadu_si256(weight_of);
    const __m256i made = between(_mm256_shuffle_epi8(source, before), _mm256_shuffle_epi8(source, after), weight);
    const __m256i bytes = _mm256_packus_epi16(made, made);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 6), _mm256_extracti128_si256(bytes, 1));
  }
}

MRCNN_AVX2 void enlarge_rows_avx2(
    const uint8_t* above, const uint8_t* below, int16_t weight, uint8_t* out, int64_t size) {
  const __m256i zero = _mm256_setzero_si256(), weights = _mm256_set1_epi16(weight);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(above + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(below + i));
    const __m256i low = between(_mm256_unpacklo_epi8(a, zero), _mm256_unpacklo_epi8(b, zero), weights);
    const __m256i high = between(_mm256_unpackhi_epi8(a, zero), _mm256_unpackhi_epi8(b, zero), weights);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_packus_epi16(low, high));
  }
  enlarge_rows(above + i, below + i, weight, out + i, size - i);
}

#endif

struct Kernels {
  void (*columns)(const uint8_t* row, const Columns& columns, uint8_t* out) = enlarge_columns;
  void (*rows)(const uint8_t* above, const uint8_t* below, int16_t weight, uint8_t* out, int64_t size) = enlarge_rows;

  Kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (has_avx2()) {
      columns = enlarge_columns_avx2;
      rows = enlarge_rows_avx2;
    }
#endif
  }
};

// Rows of the source with their columns made, when they are asked for, one after the other.
class WideRows {
 public:
  WideRows(const uint8_t* image, int64_t height, int64_t width, const Columns& columns, const Kernels& kernels)
      : image_(image), height_(height), size_(3 * width), columns_(columns), kernels_(kernels),
        padded_(size_ + kWindow) {
    for (auto& row : rows_) {
      row.resize(columns.room());
    }
  }

  // Row y. It stays until the row after the next is asked for.
  const uint8_t* operator()(int64_t y) {
    for (; made_ <= y; ++made_) {
      kernels_.columns(readable(made_), columns_, rows_[made_ % 2].data());
    }
    return rows_[y % 2].data();
  }

 private:
  // A row behind whose last pixel a window, and the pixel after the last, can be read.
  const uint8_t* readable(int64_t y) {
    const uint8_t* row = image_ + y * size_;
    if ((height_ - y - 1) * size_ >= kWindow) {
      return row;
    }
    std::memcpy(padded_.data(), row, size_);
    return padded_.data();
  }

  const uint8_t* image_;
  int64_t height_, size_, made_ = 0;
  const Columns& columns_;
  const Kernels& kernels_;
  std::vector<uint8_t> padded_, rows_[2];
};

// Memory that will be written to soon.
MRCNN_INLINE void fetch(const uint8_t* memory, int64_t size) {
  for (int64_t i = 0; i < size; i += kCacheLine) {
    __builtin_prefetch(memory + i, 1);
  }
}

void check_enlarge_image_inputs(const Tensor& image, const Tensor& out) {
  for (const Tensor& each : {image, out}) {
    check(each.dim() == 3 && each.size(2) == 3 && each.scalar_type() == ScalarType::Byte && each.is_contiguous(),
          "enlarge_image: image and out must be (H, W, 3) uint8, contiguous");
  }
  check(0 < image.size(0) && image.size(0) <= out.size(0) && 0 < image.size(1) && image.size(1) <= out.size(1),
        "enlarge_image: no side of out may be smaller than the image's: ", image.size(0), "x", image.size(1), " to ",
        out.size(0), "x", out.size(1));
}

void enlarge_image_cpu(Tensor image, Tensor out) {
  check_enlarge_image_inputs(image, out);
  const Kernels kernels;
  const EnlargedAxis rows(image.size(0), out.size(0));
  const Columns columns{EnlargedAxis(image.size(1), out.size(1))};
  WideRows wide(static_cast<const uint8_t*>(image.data_ptr()), image.size(0), image.size(1), columns, kernels);
  auto* to = static_cast<uint8_t*>(out.data_ptr());
  const int64_t size = 3 * out.size(1);
  for (int64_t y = 0; y < out.size(0); ++y, to += size) {
    if (y + kRowsAhead < out.size(0)) {
      fetch(to + kRowsAhead * size, size);
    }
    const uint8_t* above = wide(rows.before[y]);
    const uint8_t* below = wide(std::min(rows.before[y] + 1, image.size(0) - 1));
    kernels.rows(above, below, rows.weight[y], to, size);
  }
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("enlarge_image", TORCH_BOX(&mrcnn::enlarge_image_cpu));
}
