#include "documents.h"

#include <algorithm>
#include <stdexcept>

#include "permutation.h"

namespace meco {

std::pair<int64_t, int64_t> Documents::sequences_of(int64_t document) const {
  if (document_indices == nullptr) return {document, document + 1};
  const int64_t begin = load(document_indices, document);
  const int64_t end = load(document_indices, document + 1);
  if (begin < 0 || begin > end || end > num_sequences) {
    throw std::out_of_range("damaged index: sequences of a document");
  }
  return {begin, end};
}

int64_t Documents::body_length(int64_t document) const {
  const auto [begin, end] = sequences_of(document);
  int64_t length = 0;
  int64_t all = 0;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t one = load(sequence_lengths, s);
    length += one;
    all |= one;
  }
  if (all < 0) throw std::out_of_range("damaged index: a length below zero");
  return length;
}

int32_t Documents::text_id(const TextTable& table, int64_t document) const {
  if (table.ids == nullptr) return -1;
  const int32_t id = load(table.ids, document);
  if (id < -1 || id >= table.num_texts) throw std::out_of_range("prefix number out of range");
  if (plain_threshold != 0 &&
      hash_pair(plain_seed, static_cast<uint64_t>(document)) < plain_threshold) {
    return -1;
  }
  return id;
}

std::pair<int64_t, int64_t> TextTable::range(int32_t id) const {
  if (id < 0 || id >= num_texts) throw std::out_of_range("prefix number out of range");
  const int64_t begin = load(offsets, id);
  const int64_t end = load(offsets, int64_t{id} + 1);
  if (begin < 0 || begin > end || end > num_tokens || end - begin > INT32_MAX) {
    throw std::out_of_range("damaged prefix table: offsets");
  }
  return {begin, end};
}

int64_t TextTable::length(int32_t id) const {
  if (id < 0) return 0;
  const auto [begin, end] = range(id);
  return end - begin;
}

const int32_t* TextTable::first_tokens(int32_t id, int64_t count) const {
  const auto [begin, end] = range(id);
  if (count > end - begin) throw std::out_of_range("damaged prefix table: offsets");
  return tokens + begin;
}

DocumentSize Documents::size_of(int64_t document) const {
  return {document, body_length(document), text_length(prefixes, document),
          text_length(suffixes, document)};
}

int64_t Documents::cut(int64_t document, int64_t begin, int64_t room, bool must) const {
  if (document_indices == nullptr) return room;  // one sequence: no place is better
  int64_t border = 0;
  int64_t best = 0;
  const auto [first, last] = sequences_of(document);
  for (int64_t s = first; s < last; ++s) {
    border += load(sequence_lengths, s);
    if (border > begin + room) break;
    best = border;
  }
  if (best > begin) return best - begin;
  return must ? room : 0;
}

namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void check(const Documents& documents) {
  if (documents.document_indices == nullptr) return;
  int64_t last = 0;
  for (int64_t i = 0; i <= documents.num_documents; ++i) {
    const int64_t index = load(documents.document_indices, i);
    require(index >= last && index <= documents.num_sequences,
            "document_indices must rise and stay within the sequences");
    last = index;
  }
}

int64_t check(const TextTable& table) {
  if (table.offsets == nullptr) return 0;
  int64_t longest = 0;
  int64_t last = 0;
  for (int64_t i = 0; i <= table.num_texts; ++i) {
    const int64_t offset = load(table.offsets, i);
    require(offset >= last && offset <= table.num_tokens,
            "offsets must rise and stay within the tokens");
    if (i > 0) longest = std::max(longest, offset - last);
    last = offset;
  }
  require(longest <= INT32_MAX, "a prefix is longer than 2^31 - 1 tokens");
  require(table.num_texts <= INT32_MAX, "prefixes are numbered with 31 bits");
  return longest;
}

int64_t longest_prefix_and_suffix(const Documents& documents) {
  int64_t longest = 0;
  for (int64_t document = 0; document < documents.num_documents; ++document) {
    const int64_t suffix = documents.text_length(documents.suffixes, document);
    if (suffix <= 0) continue;
    const int64_t prefix = documents.text_length(documents.prefixes, document);
    longest = std::max(longest, std::max<int64_t>(prefix, 0) + suffix);
  }
  return longest;
}

}  // namespace meco
