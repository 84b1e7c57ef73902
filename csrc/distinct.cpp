#include "distinct.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace meco {

namespace {

constexpr uint64_t kFirst = 0x87C37B91114253D5ull;
constexpr uint64_t kSecond = 0x4CF5AD432745937Full;

uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// Little-endian on every machine that this is built for.
uint64_t word(const uint8_t* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

uint64_t mixed_first(uint64_t k) { return rotate(k * kFirst, 31) * kSecond; }
uint64_t mixed_second(uint64_t k) { return rotate(k * kSecond, 33) * kFirst; }

uint64_t finished(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

// The place of a hash among `size` slots: a multiplication in place of a division.
size_t place(const uint32_t* hash, size_t size) {
  return static_cast<size_t>((static_cast<uint64_t>(hash[0]) * size) >> 32);
}

}  // namespace

std::array<uint64_t, 2> hash_text(const uint8_t* text, int64_t size) {
  uint64_t a = 0, b = 0;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    a ^= mixed_first(word(text + i));
    a = (rotate(a, 27) + b) * 5 + 0x52DCE729;
    b ^= mixed_second(word(text + i + 8));
    b = (rotate(b, 31) + a) * 5 + 0x38495AB5;
  }
  uint8_t tail[16] = {};
  if (i < size) std::memcpy(tail, text + i, static_cast<size_t>(size - i));
  if (size - i > 8) b ^= mixed_second(word(tail + 8));
  if (size - i > 0) a ^= mixed_first(word(tail));
  a ^= static_cast<uint64_t>(size);
  b ^= static_cast<uint64_t>(size);
  a += b;
  b += a;
  a = finished(a);
  b = finished(b);
  a += b;
  b += a;
  return {a, b};
}

DistinctTexts::DistinctTexts() : shards_(kShards) {}

void DistinctTexts::grow(Shard* shard) {
  std::vector<Slot> slots(std::max<size_t>(16, shard->slots.size() + shard->slots.size() / 2),
                          Slot{{}, -1});
  for (const Slot& slot : shard->slots) {
    if (slot.id < 0) continue;
    size_t i = place(slot.hash, slots.size());
    while (slots[i].id >= 0) i = i + 1 == slots.size() ? 0 : i + 1;
    slots[i] = slot;
  }
  shard->slots = std::move(slots);
}

void DistinctTexts::number(const uint8_t* data, const int32_t* offsets, const uint8_t* valid,
                           int64_t count, int32_t* ids, std::vector<int64_t>* first_rows) {
  struct Hashed {
    uint32_t hash[4];
    int shard;
  };
  Hashed hashed[kAtOnce];
  for (int64_t begin = 0; begin < count; begin += kAtOnce) {
    const int64_t end = std::min<int64_t>(count, begin + kAtOnce);
    // The slots of several texts are on their way from memory at the same time.
    for (int64_t row = begin; row < end; ++row) {
      if (valid != nullptr && !valid[row]) continue;
      const auto words = hash_text(data + offsets[row], offsets[row + 1] - offsets[row]);
      Hashed& h = hashed[row - begin];
      std::memcpy(h.hash, words.data(), sizeof(h.hash));
      h.shard = static_cast<int>(words[1] >> 56);
      const std::vector<Slot>& slots = shards_[h.shard].slots;
      if (!slots.empty()) __builtin_prefetch(&slots[place(h.hash, slots.size())]);
    }
    for (int64_t row = begin; row < end; ++row) {
      if (valid != nullptr && !valid[row]) {
        ids[row] = -1;
        continue;
      }
      const Hashed& h = hashed[row - begin];
      Shard& shard = shards_[h.shard];
      // At most four fifths are used, so that a search ends soon.
      if (shard.used * 5 >= static_cast<int64_t>(shard.slots.size()) * 4) grow(&shard);
      size_t i = place(h.hash, shard.slots.size());
      while (shard.slots[i].id >= 0 &&
             std::memcmp(shard.slots[i].hash, h.hash, sizeof(h.hash)) != 0) {
        i = i + 1 == shard.slots.size() ? 0 : i + 1;
      }
      Slot& slot = shard.slots[i];
      if (slot.id < 0) {
        if (size_ == INT32_MAX) throw std::length_error("more than 2,147,483,647 distinct texts");
        std::memcpy(slot.hash, h.hash, sizeof(h.hash));
        slot.id = static_cast<int32_t>(size_++);
        ++shard.used;
        first_rows->push_back(row);
      }
      ids[row] = slot.id;
    }
  }
}

}  // namespace meco
