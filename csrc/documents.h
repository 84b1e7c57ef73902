// What packing knows of the documents of a corpus: their lengths, prefixes and suffixes.
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
  int32_t suffix = -1;  // likewise

  bool is_plain() const { return prefix < 0 && suffix < 0; }
};

// The texts that stand before documents, or those that stand behind them. Documents may share one.
struct TextTable {
  const int32_t* ids = nullptr;      // per document, -1: none; null: no texts at all
  const int64_t* offsets = nullptr;  // num_texts + 1
  int64_t num_texts = 0;
  const int32_t* tokens = nullptr;  // all texts, one after the other
  int64_t num_tokens = 0;

  // Everything below throws std::out_of_range on damaged arrays.

  // Tokens of a text; 0 of text -1.
  int64_t length(int32_t id) const;
  // The first `count` tokens of a text.
  const int32_t* first_tokens(int32_t id, int64_t count) const;

 private:
  // Where a text lies in `tokens`: [first, second).
  std::pair<int64_t, int64_t> range(int32_t id) const;
};

// The documents of one corpus. Arrays are borrowed, and may lie in mapped files that another
// process writes to: whatever is read from them is checked again where it is used.
struct Documents {
  int64_t num_documents = 0;
  const int32_t* sequence_lengths = nullptr;  // tokens of each Megatron sequence
  int64_t num_sequences = 0;
  const int64_t* document_indices = nullptr;  // first sequence of each document; null: one each
  TextTable prefixes;
  TextTable suffixes;
  bool has_bos = false;
  uint64_t plain_seed = 0;
  uint64_t plain_threshold = 0;  // a document is plain when its hash is below this

  bool has_metadata() const { return prefixes.ids != nullptr || suffixes.ids != nullptr; }

  // Everything below throws std::out_of_range on damaged arrays.

  // The sequences [first, second) of a document.
  std::pair<int64_t, int64_t> sequences_of(int64_t document) const;
  int64_t body_length(int64_t document) const;
  // The text of one of the tables that a document is shown with, or -1.
  int32_t text_id(const TextTable& table, int64_t document) const;
  // The tokens of that text, -1 if there is none.
  int32_t text_length(const TextTable& table, int64_t document) const {
    const int32_t id = text_id(table, document);
    return id < 0 ? -1 : static_cast<int32_t>(table.length(id));
  }
  DocumentSize size_of(int64_t document) const;
  // Where to cut a body that begins at `begin` and of which `room` tokens fit: after the last whole
  // Megatron sequence (a sentence) that fits. If there is none: anywhere if `must`, else 0.
  int64_t cut(int64_t document, int64_t begin, int64_t room, bool must) const;
};

// Throws std::invalid_argument unless the indices rise and stay within their array.
void check(const Documents& documents);

// Throws std::invalid_argument unless the offsets rise and stay within the tokens. Returns the
// tokens of the longest text.
int64_t check(const TextTable& table);

// The most tokens of prefix and suffix together that one document with a suffix has. Looks at all
// documents.
int64_t longest_prefix_and_suffix(const Documents& documents);

}  // namespace meco
