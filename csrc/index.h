// Whether the arrays of a Megatron index fit one another. Pure, like the rest of the core.
#pragma once

#include <cstdint>

namespace meco {

// The arrays of an `.idx` file, borrowed; they need not be aligned.
struct IndexArrays {
  const int32_t* lengths = nullptr;   // tokens of each sequence
  const int64_t* pointers = nullptr;  // first byte of each sequence in the `.bin` file
  int64_t num_sequences = 0;
  const int64_t* first_sequences = nullptr;  // of each document, and one past the last sequence
  int64_t num_bounds = 0;                    // documents + 1
  int64_t token_bytes = 0;
};

// What one pass over an index finds. Places are the lowest, and -1 where nothing is wrong.
struct IndexScan {
  int64_t num_tokens = 0;          // sum of the lengths
  int64_t bad_length = -1;         // a sequence of less than no tokens
  int64_t bad_pointer = -1;        // a sequence that does not begin where the one before it ends
  int64_t bad_bound = -1;          // an entry that is out of order, or not 0 or all at the ends
  bool one_sequence_each = false;  // whether document i is sequence i
};

// Reads every number once, on up to `num_threads` threads. Throws std::invalid_argument when an
// option is out of range.
IndexScan scan_index(const IndexArrays& index, int num_threads);

}  // namespace meco
