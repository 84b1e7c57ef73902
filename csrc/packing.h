// Which documents make up which pack.
//
// Pure functions over plain arrays: no Python, no I/O. The order of the documents is a seeded
// permutation that is computed, not stored; a plan stores one document number for each piece, one
// offset for each pack, and the body offset of the few pieces that continue a document. Results do
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace meco {

// Tokens in a pack, at most: tables by room and sample arrays are this long.
constexpr int64_t kMaxCapacity = int64_t{1} << 26;

// Reads an element wherever it lies: Megatron's index begins with 34 bytes of header, so its arrays
// are not aligned.
template <typename T>
T load(const T* array, int64_t i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(array) + i * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

// A seeded bijection of [0, size): rounds of add, odd multiply and xor-shift on the smallest power
// of two that holds `size`, walked until the value falls inside. Random access, no memory.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, uint64_t stream);
  uint64_t operator()(uint64_t index) const;
  // values[i] = (*this)(begin + i), several at a time.
  void fill(uint64_t begin, int64_t count, int64_t* values) const;

 private:
  static constexpr int kRounds = 4;
  uint64_t round_trip(uint64_t x) const;
  uint64_t size_;
  uint64_t mask_;
  int bits_;
  int shift_;
  uint64_t add_[kRounds];
  uint64_t multiply_[kRounds];
};

// A well-mixed 64-bit hash of two numbers (splitmix64 finaliser).
uint64_t hash_pair(uint64_t a, uint64_t b);

// What is known of the documents of one corpus. Arrays are borrowed, and may lie in mapped files
// that somebody writes to: whatever is read from them is checked again where it is used.
struct Documents {
  int64_t num_documents = 0;
  const int32_t* sequence_lengths = nullptr;  // tokens of each Megatron sequence
  int64_t num_sequences = 0;
  const int64_t* document_indices = nullptr;  // first sequence of each document; null: one each
  const int32_t* prefix_ids = nullptr;        // per document, -1: none; null: no prefixes at all
  const int64_t* prefix_offsets = nullptr;    // num_prefixes + 1
  int64_t num_prefixes = 0;
  int64_t num_prefix_tokens = 0;
  bool has_bos = false;
  uint64_t plain_seed = 0;
  uint64_t plain_threshold = 0;  // a document is plain when its hash is below this

  // The sequences [first, second) of a document. Throws std::out_of_range on a damaged index.
  std::pair<int64_t, int64_t> sequences_of(int64_t document) const;
  int64_t body_length(int64_t document) const;
  // The prefix a document is shown with, or -1. Throws std::out_of_range on a damaged table.
  int32_t prefix_id(int64_t document) const;
  // Where a prefix begins in the flat table. Throws std::out_of_range on a damaged table.
  int64_t prefix_begin(int32_t prefix_id) const;
  int64_t prefix_length(int32_t prefix_id) const;
  // Where to cut a body that begins at `begin` and of which `room` tokens fit: after the last whole
  // Megatron sequence (a sentence) that fits; without one, anywhere if `must`, else 0.
  int64_t cut(int64_t document, int64_t begin, int64_t room, bool must) const;
};

// Throws std::invalid_argument unless indices and offsets rise and stay within their arrays.
// Returns the tokens of the longest prefix.
int64_t check(const Documents& documents);

// Which documents, in which order: positions [range_begin, range_end) of the seeded permutation of
// documents [first_document, first_document + num_documents); later epochs permute that range.
struct Order {
  int64_t first_document = 0;
  int64_t num_documents = 0;
  int64_t range_begin = 0;
  int64_t range_end = 0;
  uint64_t seed = 0;
};

enum class Strategy { kTruncate, kSplit, kBestFit };
Strategy parse_strategy(const std::string& name);  // throws std::invalid_argument

struct PackingOptions {
  Strategy strategy = Strategy::kTruncate;
  int64_t capacity = 0;       // tokens in a pack, 2 to kMaxCapacity
  int64_t num_packs = -1;     // -1: one epoch; else as many epochs as it takes
  int64_t max_documents = 0;  // pieces in a pack, at least 1
  bool repeat_prefix = true;  // on every piece that continues a document
  int num_threads = 1;
  // Told the share of the work that is done, now and then, on the calling thread; may throw.
  std::function<void(double)> progress;
};

struct PlanCounts {
  int64_t num_epochs = 0;   // orders begun
  int64_t body_tokens = 0;  // EOD counted
  int64_t prefix_tokens = 0;
  int64_t bos_tokens = 0;
  int64_t padding_tokens = 0;
  int64_t discarded_tokens = 0;  // body tokens of documents in the plan that no pack holds
  int64_t documents = 0;         // document visits
  int64_t documents_cut = 0;
  int64_t documents_plain = 0;  // visits without prefix although a table is given
  int64_t documents_empty = 0;  // skipped: nothing but EOD
};

struct Plan {
  std::vector<int64_t> pack_offsets;     // num_packs + 1, into the pieces
  std::vector<int32_t> piece_document;   // num_pieces
  std::vector<int64_t> continued_piece;  // sorted: pieces that begin inside a document ...
  std::vector<int64_t> continued_begin;  // ... and where
  std::vector<int64_t> packs_by_size;    // number of packs with 0, 1, 2, ... pieces
  PlanCounts counts;
};

// Build a plan; without any pack when all documents are empty. Throws std::invalid_argument when an
// option is out of range, std::length_error when the plan would not fit into this machine's memory,
// std::out_of_range when an array is damaged.
Plan build_plan(const Documents& documents, const Order& order, const PackingOptions& options);

}  // namespace meco
