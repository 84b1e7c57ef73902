// From a plan to the arrays of one training sample, in one pass over the tokens.
//
// The loss mask follows from positions alone: no token value decides anything.
#pragma once

#include <cstdint>
#include <vector>

#include "documents.h"
#include "layout.h"
#include "views.h"

namespace meco {

// A plan as it lies in memory (or in a mapped file). Arrays are borrowed.
struct PlanView {
  const int64_t* pack_offsets = nullptr;
  int64_t num_packs = 0;
  const int32_t* piece_document = nullptr;
  int64_t num_pieces = 0;
  const int64_t* continued_piece = nullptr;
  const int64_t* continued_begin = nullptr;
  int64_t num_continued = 0;
};

struct AssemblyOptions : PackRules {
  int64_t bos_id = -1;
  int64_t pad_id = 0;
  int64_t vocab_size = INT64_MAX;  // all ids are below
  View view = View::kConditioned;
  bool train_on_prefix = false;
  bool train_on_suffix = true;
};

// Output arrays of one sample; all are written in full. Labels are the tokens one place on, so they
// are read from the same memory: tokens [0, capacity), labels [1, capacity + 1).
struct SampleArrays {
  int64_t* tokens;         // capacity + 1, the last is the pad id
  float* loss_mask;        // capacity
  int64_t* position_ids;   // capacity
  int32_t* cu_seqlens;     // num_cu_seqlens(options), the tail repeats `capacity`
  int32_t* max_seqlen;     // one number
  int64_t* prefix_tokens;  // one number: of prefixes and suffixes
};

// Fixed length of cu_seqlens: a zero, a bound for each piece, one for the padding. Never more than
// capacity + 1, since every segment holds a token.
inline int64_t num_cu_seqlens(const AssemblyOptions& options) {
  return options.max_documents + 2 < options.capacity + 1 ? options.max_documents + 2
                                                          : options.capacity + 1;
}

// The tokens of a corpus as they lie in its file. Arrays are borrowed.
struct TokenFile {
  const uint8_t* bytes = nullptr;
  int64_t num_bytes = 0;
  const int64_t* sequence_pointers = nullptr;  // first byte of each sequence
  int64_t num_sequences = 0;
  int token_bytes = 0;
};

// Returns the options with `max_documents` lowered as by check(PackRules*). Throws
// std::invalid_argument for options out of range.
AssemblyOptions check(const AssemblyOptions& options);

// Throws std::invalid_argument unless tokens are 1, 2, 4 or 8 bytes wide.
void check_token_bytes(int token_bytes);

// Where the body tokens of a piece lie. Throws std::out_of_range if they lie outside of the file,
// or if the pointers of the piece's document do not agree with its lengths.
const uint8_t* locate(const TokenFile& file, const Documents& documents, const Piece& piece);

// The pieces of one pack as the options' view shows them. Throws std::out_of_range if the plan and
// the corpus disagree.
std::vector<Piece> pieces_of_pack(const PlanView& plan, const Documents& documents, int64_t pack,
                                  const AssemblyOptions& options);

// Which labels of the options' view the comparison of views counts, see mark_compared; `compared`
// holds `capacity` numbers. Throws as pieces_of_pack.
void compared_of_pack(const PlanView& plan, const Documents& documents, int64_t pack,
                      const AssemblyOptions& options, float* compared);

// Fill `out` from pieces whose body tokens lie at `sources` (one pointer for each piece, to
// `token_bytes`-sized integers: unsigned of 1 and 2 bytes, signed of 4 and 8). Throws
// std::domain_error for an id outside the vocabulary.
void assemble(const std::vector<Piece>& pieces, const std::vector<const uint8_t*>& sources,
              int token_bytes, const Documents& documents, const AssemblyOptions& options,
              SampleArrays* out);

}  // namespace meco
