// Best-fit-decreasing packing.
//
// The order of the documents is cut into windows of 2^18 documents. Each window is packed alone, so
// windows can be packed in parallel; padding is only lost in the last packs of a window. For each
// window:
//
// 1. Cut the documents that are longer than a pack into pieces. All others stay whole. The size of
//    a piece includes the padding that aligns it.
// 2. Sort the pieces by size, largest first (a counting sort; equal sizes keep their order).
// 3. Put each piece into the open pack with the least room that holds it. Among packs with equal
//    room, take the one that received a piece last. If no pack holds it, open a new one.
// 4. Shuffle the packs: step 3 leaves them sorted by their largest piece.
//
// Step 3 needs no search. Packs with the same room and the same number of pieces are
// interchangeable, so they are kept as groups of consecutive pack numbers: one stack of groups for
// each room, and a bitmap of the rooms that have a group. A run of pieces of equal size is dealt to
// a whole group at a time. The cost is a few passes over the pieces and one over the rooms.
//
// Room for tiny pieces. A pack may hold at most `max_pieces` pieces. Call a piece tiny if a pack of
// `max_pieces` pieces of its size is not full: size * max_pieces < capacity. Tiny pieces come last
// in step 3. By then the larger ones have filled the packs, and packs opened for tiny pieces alone
// reach the cap on pieces before they are full, so the rest of them is padding. To avoid this:
//
// - Packs that receive a piece and have room for at most capacity / 4 tokens left are set aside,
//   until their rooms add up to the tokens of all tiny pieces.
// - Packs that are set aside are not candidates in step 3 until a piece fits no candidate and as
//   many packs are open as the window needs at the least: the larger of tokens / capacity and
//   pieces / max_pieces, rounded up. Opening one more pack would only add padding, so all that was
//   set aside becomes a candidate, and nothing is set aside any more.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "layout.h"
#include "walk.h"

namespace meco {

// Documents of one window.
constexpr int64_t kWindow = int64_t{1} << 18;

// The packs of one window, and what it takes to make them. Pieces are numbered in the order of
// their documents until the packs are known.
struct Window {
  Chunk chunk;
  // Of each piece, by its number.
  std::vector<int32_t> document;
  std::vector<int32_t> size;   // tokens in the pack
  std::vector<int64_t> begin;  // in the body
  // By size.
  std::vector<int32_t> count_of_size;  // pieces
  std::vector<int32_t> next_rank;      // in the order by falling size
  // By rank, then by pack.
  std::vector<int32_t> pack_of_rank;
  std::vector<int64_t> place_of_pack;  // among the shuffled packs
  std::vector<int32_t> next_slot;      // where the pack's next piece goes
  // The result, pack after shuffled pack.
  std::vector<int32_t> pack_offsets;    // number of packs + 1, into the pieces
  std::vector<int32_t> piece_document;  // number of pieces
  std::vector<int64_t> piece_begin;     // number of pieces
  std::vector<int32_t> continued;       // pieces that begin inside a document, rising
  // Totals.
  PieceSize tokens;
  int64_t documents = 0;
  int64_t documents_cut = 0;
  int64_t documents_plain = 0;
  int64_t documents_empty = 0;

  int64_t num_packs() const { return static_cast<int64_t>(pack_offsets.size()) - 1; }
};

// Packs windows, on several threads at once.
class WindowPacker {
 public:
  WindowPacker(const Documents& documents, const PackRules& rules, uint64_t seed)
      : documents_(documents), rules_(rules), layout_(documents, rules), seed_(seed) {}

  // Throws std::length_error if a window has too many pieces, std::out_of_range on damaged arrays.
  std::unique_ptr<Window> pack(const Walk& walk, const Task& task) const;
  // Keeps a window's memory for the next one: touching fresh pages would take a fifth of the time.
  void recycle(std::unique_ptr<Window> window) const;

 private:
  std::unique_ptr<Window> take_spare() const;
  void cut_documents(Window* window) const;
  void order_pieces(int64_t num_packs, uint64_t stream, Window* window) const;

  const Documents& documents_;
  const PackRules& rules_;
  const Layout layout_;
  const uint64_t seed_;
  mutable std::mutex spare_mutex_;
  mutable std::vector<std::unique_ptr<Window>> spare_;
};

}  // namespace meco
