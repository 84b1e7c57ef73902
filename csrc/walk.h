// The order in which a phase visits its documents, read in stretches of documents with their sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "documents.h"
#include "permutation.h"

namespace meco {

// Which documents, in which order: positions [range_begin, range_end) of the seeded permutation of
// documents [first_document, first_document + num_documents). Later epochs permute that range.
struct Order {
  int64_t first_document = 0;
  int64_t num_documents = 0;
  int64_t range_begin = 0;
  int64_t range_end = 0;
  uint64_t seed = 0;
};

// Positions [begin, end) of one epoch.
struct Task {
  int64_t epoch;
  int64_t begin;
  int64_t end;
};

// The documents of one task, in order.
struct Chunk {
  std::vector<int64_t> number;
  std::vector<int64_t> body;
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;  // empty where no document has one

  size_t size() const { return number.size(); }
  DocumentSize operator[](size_t i) const {
    return {number[i], body[i], prefix[i], suffix.empty() ? -1 : suffix[i]};
  }
};

class Walk {
 public:
  Walk(const Documents& documents, const Order& order);

  int64_t epoch_size() const { return size_; }
  // Thread-safe. Throws std::out_of_range on damaged arrays.
  void read(const Task& task, Chunk* chunk) const;

 private:
  void read_numbers(const Task& task, int64_t* number) const;
  void read_lengths(const int64_t* number, int64_t count, int64_t* body) const;
  void read_texts(const TextTable& table, const int64_t* number, int64_t count,
                  int32_t* length) const;

  const Documents& documents_;
  Order order_;
  int64_t size_;
  Permutation split_;
};

}  // namespace meco
