// COCO's compressed run lengths on the CPU: how data sets and results store masks.
//
// A mask's run lengths are written as numbers of five bits a digit, the least first, each from the third on as its
// difference to the last but one (pycocotools, maskApi.c, rleToString and rleFrString). Here a mask is its runs' ends.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "to_tensor.h"

namespace mrcnn {
namespace {

constexpr int64_t kBits = 5;          // of a digit
constexpr int64_t kMore = 32;         // set in a digit after which another one comes
constexpr int64_t kNegative = 16;     // set in the last digit of a negative number
constexpr int64_t kZero = 48;         // the character of digit 0
constexpr int64_t kMostDigits = 7;    // of a difference of two 32-bit numbers

void write_number(int64_t value, std::vector<uint8_t>& text) {
  for (bool more = true; more;) {
    const int64_t digit = value & (kMore - 1);
    value >>= kBits;
    more = digit & kNegative ? value != -1 : value != 0;
    text.push_back(static_cast<uint8_t>(kZero + digit + (more ? kMore : 0)));
  }
}

void write_mask(const int32_t* begin, const int32_t* end, std::vector<uint8_t>& text) {
  const auto length = [&](int64_t i) { return static_cast<int64_t>(begin[i]) - (i > 0 ? begin[i - 1] : 0); };
  for (int64_t i = 0; i < end - begin; ++i) {
    write_number(length(i) - (i > 2 ? length(i - 2) : 0), text);
  }
}

// The runs' ends of one mask. False for what are none.
bool read_mask(const uint8_t* text, const uint8_t* end, std::vector<int32_t>& ends) {
  int64_t total = 0, before_last = 0, last = 0, runs = 0;  // lengths of the two runs before
  while (text != end) {
    int64_t value = 0, digits = 0, digit = kMore;
    for (; digit & kMore; ++digits) {
      if (text == end || digits == kMostDigits || *text < kZero || *text >= kZero + 2 * kMore) {
        return false;
      }
      digit = *text++ - kZero;
      value |= (digit & (kMore - 1)) << (kBits * digits);
    }
    if (digit & kNegative) {
      value -= int64_t{1} << (kBits * digits);
    }
    const int64_t length = value + (runs > 2 ? before_last : 0);
    total += length;
    if (length < 0 || total > INT32_MAX) {
      return false;
    }
    before_last = last;
    last = length;
    ends.push_back(static_cast<int32_t>(total));
    ++runs;
  }
  return runs > 0;
}

void check_offsets(const char* what, const Tensor& values, ScalarType type, const Tensor& offsets) {
  check(values.dim() == 1 && values.scalar_type() == type && values.is_contiguous(), what,
        ": what the offsets point to is of a wrong shape or dtype");
  check(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.scalar_type() == ScalarType::Long &&
            offsets.is_contiguous(),
        what, ": offsets must be (I + 1,) int64");
  const auto* offset = static_cast<const int64_t*>(offsets.data_ptr());
  for (int64_t i = 0; i + 1 < offsets.size(0); ++i) {
    check(offset[i] >= 0 && offset[i] <= offset[i + 1] && offset[i + 1] <= values.size(0), what, ": offsets of mask ",
          i, " do not lie in its ", values.size(0), " numbers");
  }
}

std::tuple<Tensor, Tensor> rle_encode_cpu(Tensor ends, Tensor offsets) {
  check_offsets("rle_encode", ends, ScalarType::Int, offsets);
  const auto* end = static_cast<const int32_t*>(ends.data_ptr());
  const auto* offset = static_cast<const int64_t*>(offsets.data_ptr());
  std::vector<uint8_t> text;
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i + 1 < offsets.size(0); ++i) {
    write_mask(end + offset[i], end + offset[i + 1], text);
    starts.push_back(static_cast<int64_t>(text.size()));
  }
  return {to_tensor(text, ends, ScalarType::Byte), to_tensor(starts, offsets, ScalarType::Long)};
}

std::tuple<Tensor, Tensor> rle_decode_cpu(Tensor text, Tensor offsets) {
  check_offsets("rle_decode", text, ScalarType::Byte, offsets);
  const auto* character = static_cast<const uint8_t*>(text.data_ptr());
  const auto* offset = static_cast<const int64_t*>(offsets.data_ptr());
  std::vector<int32_t> ends;
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i + 1 < offsets.size(0); ++i) {
    check(read_mask(character + offset[i], character + offset[i + 1], ends), "rle_decode: string ", i,
          " is not one of compressed COCO run lengths");
    starts.push_back(static_cast<int64_t>(ends.size()));
  }
  return {to_tensor(ends, text, ScalarType::Int), to_tensor(starts, offsets, ScalarType::Long)};
}

}  // namespace
}  // namespace mrcnn

STABLE_TORCH_LIBRARY_IMPL(mrcnn, CPU, m) {
  m.impl("rle_encode", TORCH_BOX(&mrcnn::rle_encode_cpu));
  m.impl("rle_decode", TORCH_BOX(&mrcnn::rle_decode_cpu));
}
