// A block's shared memory: NaN to begin with, between guard zones that must come out as they went in.
//
// Under AddressSanitizer the guards may not even be read. Used by simt.cpp.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "core/math.h"
#include "simt/fiber.h"

namespace mote::simt {

inline constexpr unsigned char kPoison = 0xff;  // NaN in every element type

class Arena {
 public:
  explicit Arena(size_t num_bytes)
      : num_bytes_(num_bytes),
        memory_(static_cast<unsigned char*>(
            std::aligned_alloc(kAlignment, round_up(num_bytes + 2 * kGuardBytes, kAlignment)))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }

  ~Arena() {
    unlock_guards();
    std::free(memory_);
  }

  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  unsigned char* begin() { return memory_ + kGuardBytes; }

  bool holds_16(const void* pointer) {
    const auto* bytes = static_cast<const unsigned char*>(pointer);
    return bytes >= begin() && bytes + 16 <= begin() + num_bytes_;
  }

  void prepare() {
    std::memset(memory_, kGuardByte, num_bytes_ + 2 * kGuardBytes);
    std::memset(begin(), kPoison, num_bytes_);
    ASAN_POISON_MEMORY_REGION(memory_, kGuardBytes);
    ASAN_POISON_MEMORY_REGION(begin() + num_bytes_, kGuardBytes);
  }

  void check_guards() {
    unlock_guards();
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (memory_[i] != kGuardByte) complain(static_cast<int64_t>(i) - static_cast<int64_t>(kGuardBytes));
      if (begin()[num_bytes_ + i] != kGuardByte) complain(static_cast<int64_t>(num_bytes_ + i));
    }
  }

 private:
  static constexpr size_t kGuardBytes = 1024;
  static constexpr size_t kAlignment = 128;
  static constexpr unsigned char kGuardByte = 0xa5;

  void unlock_guards() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, kGuardBytes);
    ASAN_UNPOISON_MEMORY_REGION(begin() + num_bytes_, kGuardBytes);
  }

  void complain(int64_t offset) {
    throw std::runtime_error("wrote outside its " + std::to_string(num_bytes_) + " bytes of shared memory, at byte " +
                             std::to_string(offset));
  }

  size_t num_bytes_;
  unsigned char* memory_;
};

}  // namespace mote::simt
