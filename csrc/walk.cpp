#include "walk.h"

#include <algorithm>
#include <stdexcept>

namespace meco {

namespace {

// Lengths and prefix numbers are read in random order. This many places ahead hides the latency.
constexpr int64_t kPrefetch = 24;

}  // namespace

Walk::Walk(const Documents& documents, const Order& order)
    : documents_(documents),
      order_(order),
      size_(order.range_end - order.range_begin),
      split_(static_cast<uint64_t>(order.num_documents), order.seed, 0) {}

void Walk::read(const Task& task, Chunk* chunk) const {
  const int64_t count = task.end - task.begin;
  chunk->number.resize(static_cast<size_t>(count));
  chunk->body.resize(static_cast<size_t>(count));
  chunk->prefix.resize(static_cast<size_t>(count));
  read_numbers(task, chunk->number.data());
  read_lengths(chunk->number.data(), count, chunk->body.data());
  read_texts(documents_.prefixes, chunk->number.data(), count, chunk->prefix.data());
  if (documents_.suffixes.ids == nullptr) return;
  chunk->suffix.resize(static_cast<size_t>(count));
  read_texts(documents_.suffixes, chunk->number.data(), count, chunk->suffix.data());
}

void Walk::read_numbers(const Task& task, int64_t* number) const {
  const int64_t count = task.end - task.begin;
  // The first epoch walks the split's own permutation, which is random already.
  if (task.epoch == 0) {
    split_.fill(static_cast<uint64_t>(order_.range_begin + task.begin), count, number);
  } else {
    const Permutation epoch(static_cast<uint64_t>(size_), order_.seed,
                            static_cast<uint64_t>(task.epoch));
    epoch.fill(static_cast<uint64_t>(task.begin), count, number);
    for (int64_t i = 0; i < count; ++i) {
      number[i] =
          static_cast<int64_t>(split_(static_cast<uint64_t>(order_.range_begin + number[i])));
    }
  }
  for (int64_t i = 0; i < count; ++i) number[i] += order_.first_document;
}

void Walk::read_lengths(const int64_t* number, int64_t count, int64_t* body) const {
  if (documents_.document_indices != nullptr) {
    for (int64_t i = 0; i < count; ++i) body[i] = documents_.body_length(number[i]);
    return;
  }
  const int32_t* lengths = documents_.sequence_lengths;
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(lengths + number[std::min(i + kPrefetch, count - 1)]);
    body[i] = load(lengths, number[i]);
    all |= body[i];
  }
  if (all < 0) throw std::out_of_range("damaged index: a length below zero");
}

void Walk::read_texts(const TextTable& table, const int64_t* number, int64_t count,
                      int32_t* length) const {
  if (table.ids == nullptr) {
    std::fill(length, length + count, -1);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(table.ids + number[std::min(i + kPrefetch, count - 1)]);
    length[i] = documents_.text_length(table, number[i]);
  }
}

}  // namespace meco
