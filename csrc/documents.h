// What packing knows of the documents of a corpus: their lengths and their prefixes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace meco {

// Reads an element at any address: Megatron's index begins with a header of 34 bytes, so its arrays
// are not aligned.
template <typename T>
T load(const T* array, int64_t i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(array) + i * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

// One document as packing sees it.
struct DocumentSize {
  int64_t number = 0;
  int64_t body = 0;     // tokens, EOD included
  int32_t prefix = -1;  // tokens of its prefix, -1 if it is shown without one
};

// The documents of one corpus. Arrays are borrowed, and may lie in mapped files that another
// process writes to: whatever is read from them is checked again where it is used.
struct Documents {
  int64_t num_documents = 0;
  const int32_t* sequence_lengths = nullptr;  // tokens of each Megatron sequence
  int64_t num_sequences = 0;
  const int64_t* document_indices = nullptr;  // first sequence of each document; null: one each
  const int32_t* prefix_ids = nullptr;        // per document, -1: none; null: no prefixes at all
  const int64_t* prefix_offsets = nullptr;    // num_prefixes + 1
  int64_t num_prefixes = 0;
  const int32_t* prefix_tokens = nullptr;  // all prefixes, one after the other
  int64_t num_prefix_tokens = 0;
  bool has_bos = false;
  uint64_t plain_seed = 0;
  uint64_t plain_threshold = 0;  // a document is plain when its hash is below this

  // Everything below throws std::out_of_range on damaged arrays.

  // The sequences [first, second) of a document.
  std::pair<int64_t, int64_t> sequences_of(int64_t document) const;
  int64_t body_length(int64_t document) const;
  // The prefix that a document is shown with, or -1.
  int32_t prefix_id(int64_t document) const;
  // Where a prefix lies in the flat table: [first, second).
  std::pair<int64_t, int64_t> prefix_range(int32_t prefix_id) const;
  int64_t prefix_length(int32_t prefix_id) const;
  // The first `count` tokens of a prefix.
  const int32_t* prefix(int32_t prefix_id, int64_t count) const;
  DocumentSize size_of(int64_t document) const;
  // Where to cut a body that begins at `begin` and of which `room` tokens fit: after the last whole
  // Megatron sequence (a sentence) that fits. If there is none: anywhere if `must`, else 0.
  int64_t cut(int64_t document, int64_t begin, int64_t room, bool must) const;
};

// Throws std::invalid_argument unless indices and offsets rise and stay within their arrays.
// Returns the tokens of the longest prefix.
int64_t check(const Documents& documents);

}  // namespace meco
