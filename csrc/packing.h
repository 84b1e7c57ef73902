// Plans: which documents make up which pack.
//
// Pure functions over plain arrays: no Python, no I/O. The order of the documents is a seeded
// permutation that is computed, not stored (walk.h). A plan stores one document number per piece,
// one offset per pack, and the body offset of the few pieces that continue a document; layout.h
// works out the rest. Results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "documents.h"
#include "layout.h"
#include "walk.h"

namespace meco {

struct PackingOptions : PackRules {
  int64_t num_packs = -1;  // -1: one epoch; else as many epochs as it takes
  int num_threads = 1;
  // Called now and then with the share of the work that is done, on the calling thread; may throw.
  std::function<void(double)> progress;
};

struct PlanCounts {
  int64_t num_epochs = 0;     // epochs begun
  int64_t body_tokens = 0;    // EOD counted
  int64_t prefix_tokens = 0;  // repeated ones among them
  int64_t suffix_tokens = 0;
  int64_t bos_tokens = 0;
  int64_t padding_tokens = 0;
  int64_t alignment_tokens = 0;  // those of the padding that belong to a piece
  int64_t discarded_tokens = 0;  // body tokens of documents in the plan that no pack holds
  int64_t documents = 0;         // document visits
  int64_t documents_cut = 0;
  int64_t documents_plain = 0;  // visits without prefix and suffix although a table is given
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

// Build a plan; without any pack if all documents are empty. Throws std::invalid_argument if an
// option is out of range, std::length_error if the plan would not fit into this machine's memory,
// std::out_of_range if an array is damaged.
Plan build_plan(const Documents& documents, const Order& order, const PackingOptions& options);

}  // namespace meco
