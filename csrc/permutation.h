// A random order that is computed, not stored.
#pragma once

#include <cstdint>

namespace meco {

// A well-mixed 64-bit hash of two numbers (the splitmix64 finaliser).
uint64_t hash_pair(uint64_t a, uint64_t b);

// A seeded bijection of [0, size): rounds of add, odd multiply and xor-shift on the smallest power
// of two that holds `size`, repeated until the value falls inside. Random access, no memory.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, uint64_t stream);
  uint64_t operator()(uint64_t index) const;
  // values[i] = (*this)(begin + i), several at a time.
  void fill(uint64_t begin, int64_t count, int64_t* values) const;

 private:
  static constexpr int kRounds = 4;
  uint64_t apply_rounds(uint64_t x) const;

  uint64_t size_;
  uint64_t mask_;
  int bits_;
  int shift_;
  uint64_t add_[kRounds];
  uint64_t multiply_[kRounds];
};

}  // namespace meco
