#include "permutation.h"

#include <algorithm>

#include "vector_clones.h"

namespace meco {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// One block of the permutation in 32-bit arithmetic, which gives the same low bits. The
// multiplications have no SSE2 form; with AVX2, eight run at once.
MECO_VECTOR_CLONES void permute_block(uint32_t* x, int64_t count, uint32_t mask, int shift,
                                      const uint64_t* add, const uint64_t* multiply, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const auto a = static_cast<uint32_t>(add[round]);
    const auto m = static_cast<uint32_t>(multiply[round]);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t y = (x[i] + a) & mask;
      y = (y * m) & mask;
      x[i] = y ^ (y >> shift);
    }
  }
}

}  // namespace

uint64_t hash_pair(uint64_t a, uint64_t b) { return mix(mix(a + kGolden) + (b + 1) * kGolden); }

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t stream) : size_(size) {
  bits_ = 1;
  while (bits_ < 64 && (uint64_t{1} << bits_) < size) ++bits_;
  mask_ = bits_ == 64 ? ~uint64_t{0} : (uint64_t{1} << bits_) - 1;
  shift_ = (bits_ + 1) / 2;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t key = hash_pair(hash_pair(seed, stream), static_cast<uint64_t>(round));
    add_[round] = key & mask_;
    multiply_[round] = (mix(key) | 1) & mask_;
  }
}

uint64_t Permutation::apply_rounds(uint64_t x) const {
  for (int round = 0; round < kRounds; ++round) {
    x = (x + add_[round]) & mask_;
    x = (x * multiply_[round]) & mask_;
    x ^= x >> shift_;
  }
  return x;
}

uint64_t Permutation::operator()(uint64_t index) const {
  uint64_t x = apply_rounds(index);
  while (x >= size_) x = apply_rounds(x);
  return x;
}

void Permutation::fill(uint64_t begin, int64_t count, int64_t* values) const {
  if (bits_ > 32) {
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<int64_t>((*this)(begin + static_cast<uint64_t>(i)));
    }
    return;
  }
  constexpr int64_t kBlock = 1024;
  uint32_t x[kBlock];
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = std::min(kBlock, count - done);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = static_cast<uint32_t>(begin + static_cast<uint64_t>(done + i));
    }
    permute_block(x, n, static_cast<uint32_t>(mask_), shift_, add_, multiply_, kRounds);
    // Values outside the range are gathered and permuted again until none is left.
    int32_t outside[kBlock];
    uint32_t again[kBlock];
    int64_t num_outside = 0;
    for (int32_t i = 0; i < n; ++i) {
      values[done + i] = x[i];
      outside[num_outside] = i;
      num_outside += x[i] >= size_ ? 1 : 0;
    }
    while (num_outside > 0) {
      for (int64_t i = 0; i < num_outside; ++i) again[i] = x[outside[i]];
      permute_block(again, num_outside, static_cast<uint32_t>(mask_), shift_, add_, multiply_,
                    kRounds);
      int64_t left = 0;
      for (int64_t i = 0; i < num_outside; ++i) {
        const int32_t at = outside[i];
        x[at] = again[i];
        values[done + at] = again[i];
        outside[left] = at;
        left += again[i] >= size_ ? 1 : 0;
      }
      num_outside = left;
    }
  }
}

}  // namespace meco
