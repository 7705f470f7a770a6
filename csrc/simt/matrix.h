// Memory for tests: matrices that end with their last element, so that a step beyond is a step out of the allocation.
//
// Used by asan_main.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "core/scalar.h"

namespace mote::simt {

inline constexpr unsigned char kNaNByte = 0xff;      // NaN in every element type
inline constexpr unsigned char kGarbageByte = 0x5a;  // a finite number in every element type

inline int element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  int below(int64_t bound) { return static_cast<int>(next() % static_cast<uint64_t>(bound)); }
  double symmetric() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1.0; }

 private:
  // splitmix64.
  uint64_t next() {
    uint64_t value = state_ += 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    return value ^ value >> 31;
  }

  uint64_t state_;
};

// A matrix in memory that ends with its last element. A stride of 0 repeats the first row.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t columns, int64_t stride, bool misaligned, unsigned char fill)
      : dtype(dtype), rows(rows), columns(columns), stride(stride), fill_(fill) {
    const int64_t elements = rows == 0 ? 0 : (rows - 1) * stride + columns;
    first_byte_ = misaligned ? element_bytes(dtype) : 0;
    num_bytes_ = first_byte_ + static_cast<size_t>(elements * element_bytes(dtype));
    memory_.reset(new unsigned char[num_bytes_]);
    std::memset(memory_.get(), fill, num_bytes_);
  }

  void* data() const { return memory_.get() + first_byte_; }

  double get(int64_t row, int64_t column) const {
    const unsigned char* place = at(row, column);
    switch (dtype) {
      case DType::kF32: return read<float>(place);
      case DType::kF16: return host_to_float(read<f16>(place));
      default: return host_to_float(read<bf16>(place));
    }
  }

  void set(int64_t row, int64_t column, double value) {
    const float rounded = static_cast<float>(value);
    switch (dtype) {
      case DType::kF32: return write(at(row, column), rounded);
      case DType::kF16: return write(at(row, column), host_round<f16>(rounded));
      default: return write(at(row, column), host_round<bf16>(rounded));
    }
  }

  bool same_bits(const Matrix& other) const {
    return num_bytes_ == other.num_bytes_ && std::memcmp(memory_.get(), other.memory_.get(), num_bytes_) == 0;
  }

  // Whether the memory between the rows is as it was.
  bool gaps_untouched() const {
    for (int64_t row = 0; row + 1 < rows; ++row) {
      const unsigned char* end = at(row, columns);
      for (const unsigned char* byte = end; byte < at(row + 1, 0); ++byte) {
        if (*byte != fill_) return false;
      }
    }
    return true;
  }

  const DType dtype;
  const int64_t rows, columns, stride;

 private:
  unsigned char* at(int64_t row, int64_t column) const {
    return memory_.get() + first_byte_ + (row * stride + column) * element_bytes(dtype);
  }

  template <typename Scalar>
  static Scalar read(const unsigned char* place) {
    Scalar value;
    std::memcpy(&value, place, sizeof value);
    return value;
  }

  template <typename Scalar>
  static void write(unsigned char* place, Scalar value) {
    std::memcpy(place, &value, sizeof value);
  }

  unsigned char fill_;
  size_t first_byte_, num_bytes_;
  std::unique_ptr<unsigned char[]> memory_;
};

template <typename Element>
std::unique_ptr<Element[]> exactly(const std::vector<Element>& values) {
  std::unique_ptr<Element[]> copy(new Element[values.size()]);
  std::copy(values.begin(), values.end(), copy.get());
  return copy;
}

// The values of a matrix, converted once.
class Numbers {
 public:
  explicit Numbers(const Matrix& matrix) : columns_(matrix.columns) {
    values_.reserve(static_cast<size_t>(matrix.rows * matrix.columns));
    for (int64_t row = 0; row < matrix.rows; ++row) {
      for (int64_t column = 0; column < matrix.columns; ++column) values_.push_back(matrix.get(row, column));
    }
  }

  const double* row(int64_t row) const { return values_.data() + row * columns_; }

 private:
  int64_t columns_;
  std::vector<double> values_;
};

}  // namespace mote::simt
