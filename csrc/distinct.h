// Numbers for distinct texts, in the order in which they first appear, by their 128-bit hashes.
//
// The texts are not kept: two different ones get the same number when their hashes are equal, which
// has a probability of 2e-23 for 10^8 texts. 25 to 38 bytes for each distinct text.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace meco {

// MurmurHash3_x64_128 of Austin Appleby (public domain), with seed 0.
std::array<uint64_t, 2> hash_text(const uint8_t* text, int64_t size);

class DistinctTexts {
 public:
  DistinctTexts();
  // Text i is data[offsets[i], offsets[i + 1]) and gets ids[i]; -1 where `valid` (may be null) is
  // 0. The rows where a text appears for the first time are appended to `first_rows`. The caller
  // has checked the offsets. Throws std::length_error beyond 2^31 - 1 distinct texts.
  void number(const uint8_t* data, const int32_t* offsets, const uint8_t* valid, int64_t count,
              int32_t* ids, std::vector<int64_t>* first_rows);
  int64_t size() const { return size_; }

 private:
  struct Slot {
    uint32_t hash[4];
    int32_t id;  // -1: empty
  };
  // A table of its own for each value of the hash's last byte, so that growing needs little room.
  struct Shard {
    std::vector<Slot> slots;
    int64_t used = 0;
  };
  static constexpr int kShards = 256;
  static constexpr int kAtOnce = 32;
  static void grow(Shard* shard);

  std::vector<Shard> shards_;
  int64_t size_ = 0;
};

}  // namespace meco
