// The views in which validation shows a pack. All hold the same body tokens:
//
//   conditioned  each piece with its own prefix and suffix, as in training
//   plain        no prefixes and suffixes; the room that they leave is padding
//   shuffled     the prefixes of the pack dealt to its pieces anew, and the suffixes likewise
//
// Only pieces with whole prefixes and at least one body token take part in the shuffle. They are
// sorted by a hash of the prefix's tokens, seeded with the pack's number, and each takes the prefix
// of the piece m places on, where m is the number of pieces that share the most frequent prefix. So
// as few pieces as possible get an equal prefix back: none, unless one prefix belongs to more than
// half of them. The pack's length does not change, since the prefixes are a permutation.
//
// Where segments are aligned, other prefixes need other padding, and where prefixes are repeated,
// longer ones may come to pieces that repeat them more often: the pack may grow. All numbers
// of places from m to n - m leave as few equal prefixes, where n is the number of sorted pieces.
// They are tried in that order, and the first one that fits the pack is taken. If there is none,
// every piece keeps its prefix.
//
// Then the suffixes are shuffled by the same rules, among the pieces with a whole suffix.
//
// The loss under the right and under a wrong prefix is compared on the pieces whose prefix or
// suffix changes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "documents.h"
#include "layout.h"

namespace meco {

enum class View { kConditioned, kPlain, kShuffled };
View parse_view(const std::string& name);  // throws std::invalid_argument

// The prefix or the suffix of a piece.
using TextOfPiece = ShownText Piece::*;

// For each piece the number of the piece whose text it has in the shuffled view: its own if it
// takes no part. `table` is the one of these texts. Throws std::out_of_range on a damaged table.
std::vector<size_t> shuffled_texts(const std::vector<Piece>& pieces, TextOfPiece text,
                                   const TextTable& table, const PackRules& rules, int64_t pack);

// Turns the pieces of a pack from the conditioned view into another one.
void show(View view, const PackRules& rules, const Documents& documents, int64_t pack,
          std::vector<Piece>* pieces);

// Marks with 1 the positions whose label is a body token that the comparison counts, and all others
// with 0: the body tokens of the pieces whose prefix or suffix changes in the shuffled view.
// Without BOS the first of them is left out, because the plain view has nothing to predict it from.
// So the marked tokens are the same in all views, at other positions. EOD is one of them, behind a
// suffix too; tokens of a suffix are not.
//
// `pieces` are those of the conditioned view. `compared` holds `capacity` numbers.
void mark_compared(View view, const PackRules& rules, const Documents& documents, int64_t pack,
                   const std::vector<Piece>& pieces, float* compared);

}  // namespace meco
