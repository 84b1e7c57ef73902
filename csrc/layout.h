// What a piece of a document holds, and where it ends. Nothing else in the core decides that.
//
// A pack is a list of pieces. A piece is a document or a part of one, as runs of tokens of one
// kind:
//
//     [BOS] [prefix] body [padding]
//     [BOS] [prefix] body without EOD, suffix, EOD [padding]
//
// With `repeat_every` the prefix stands once more after every so many tokens of a piece's body, as
// long as others follow; the EOD behind a suffix does not count.
//
// A suffix stands on the piece that ends its document. `truncate` may cut the piece inside the
// suffix or a repeated prefix. The other strategies keep the suffix and EOD whole, behind at least
// one token of the body: a document is cut earlier for that.
//
// Padding makes it a multiple of the plan's alignment. It belongs to the piece: attention sees one
// segment, positions run on, nothing of it is in the loss. Since packs are multiples of the
// alignment too, so is the room that is left, and a piece that fits still fits with its padding.
//
// A plan stores where a piece begins, not where it ends: `Layout::fit` works the end out from the
// room that is left in the pack. The packer calls it to fill packs, the assembler calls it again to
// make a sample, so the two cannot disagree. This keeps a plan at 4 bytes a piece.
//
// A new kind of token takes three changes here: a count in `PieceSize`, its share of the room in
// `Layout::fit`, and its run in `for_each_run`. Then packer and assembler account for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "documents.h"

namespace meco {

// Most tokens in a pack: best-fit's tables and the arrays of a sample are this long.
constexpr int64_t kMaxCapacity = int64_t{1} << 26;

enum class Strategy { kTruncate, kSplit, kBestFit };
Strategy parse_strategy(const std::string& name);  // throws std::invalid_argument

// What a plan and the samples made from it have in common.
struct PackRules {
  Strategy strategy = Strategy::kTruncate;
  int64_t capacity = 0;       // tokens in a pack, 2 to kMaxCapacity
  int64_t max_documents = 0;  // pieces in a pack, at least 1
  bool repeat_prefix = true;  // on every piece that continues a document
  int64_t repeat_every = 0;   // tokens of the body; 0: no repetition within a piece
  int64_t alignment = 1;      // every segment is a multiple of it; divides the capacity

  // Tokens of padding behind `tokens`.
  int64_t padding_after(int64_t tokens) const {
    if (alignment == 1) return 0;
    const int64_t over = tokens % alignment;
    return over == 0 ? 0 : alignment - over;
  }
};

// How often a prefix is repeated among `tokens` of a body.
inline int64_t repeats(int64_t tokens, int64_t every) {
  return every > 0 && tokens > 0 ? (tokens - 1) / every : 0;
}

// Throws std::invalid_argument for rules out of range. Lowers `max_documents` and `repeat_every` to
// the capacity at most, since every piece holds a token, and no more than that.
void check(PackRules* rules);

// Tokens of each kind in a piece.
struct PieceSize {
  int64_t bos = 0;
  int64_t prefix = 0;
  int64_t body = 0;
  int64_t repeated = 0;  // of prefixes within the body
  int64_t suffix = 0;
  int64_t padding = 0;

  int64_t total() const { return bos + prefix + body + repeated + suffix + padding; }
};

class Layout {
 public:
  Layout(const Documents& documents, const PackRules& rules)
      : documents_(documents), rules_(rules), bos_(documents.has_bos ? 1 : 0) {}

  // Whether a piece can hold more than BOS, one prefix and its body.
  static bool has_extras(const Documents& documents, const PackRules& rules) {
    return documents.suffixes.ids != nullptr || rules.repeat_every > 0;
  }

  // Whether the rest of a cut document is dropped. If not, another piece continues it.
  bool drops_rest() const { return rules_.strategy == Strategy::kTruncate; }
  // Whether the piece that begins at `begin` of a body repeats the document's prefix.
  bool shows_prefix(int64_t begin) const { return begin == 0 || rules_.repeat_prefix; }
  // Tokens that stand in front of the body.
  int64_t head(int64_t prefix) const { return bos_ + prefix; }

  // What a piece holds that begins at `begin` of a document's body, in a pack with `room` tokens
  // left. Without a body token the piece does not fit, unless `drops_rest`: then its head filled
  // the pack.
  PieceSize fit(const DocumentSize& document, int64_t begin, int64_t room) const {
    switch (rules_.strategy) {
      case Strategy::kTruncate:
        return fit_as<Strategy::kTruncate, true>(document, begin, room);
      case Strategy::kSplit:
        return fit_as<Strategy::kSplit, true>(document, begin, room);
      default:
        return fit_as<Strategy::kBestFit, true>(document, begin, room);
    }
  }

  // The same, compiled for one strategy. `kExtras` may be false where `has_extras` is.
  template <Strategy kStrategy, bool kExtras>
  PieceSize fit_as(const DocumentSize& document, int64_t begin, int64_t room) const {
    // Best-fit cuts documents before it knows their packs: always as for an empty one.
    if constexpr (kStrategy == Strategy::kBestFit) room = rules_.capacity;
    PieceSize piece;
    int64_t left = room;
    piece.bos = std::min(bos_, left);
    left -= piece.bos;
    if (document.prefix > 0 && shows_prefix(begin)) {
      piece.prefix = std::min<int64_t>(document.prefix, left);
      left -= piece.prefix;
    }
    const int64_t rest = document.body - begin;
    const int64_t suffix = document.suffix;
    if (kExtras && rules_.repeat_every > 0 && piece.prefix > 0) {
      const BodySize fitted =
          fit_repeated<kStrategy>(document, begin, left, room == rules_.capacity);
      piece.body = fitted.body;
      piece.repeated = fitted.repeated;
      piece.suffix = fitted.suffix;
      piece.padding = rules_.padding_after(piece.total());
      return piece;
    }
    if (!kExtras || suffix <= 0) {
      piece.body = std::min(rest, left);
    } else if (kStrategy == Strategy::kTruncate) {
      piece.body = std::min(rest - 1, left);
      left -= piece.body;
      piece.suffix = std::min(suffix, left);
      if (left > piece.suffix) ++piece.body;  // EOD
    } else if (rest + suffix <= left) {
      piece.body = rest;
      piece.suffix = suffix;
    } else {
      // The piece that ends the document needs a token of the body and EOD beside the suffix.
      piece.body = std::min(std::max<int64_t>(rest - 2, 0), left);
    }
    if (kStrategy != Strategy::kTruncate && piece.body < rest) {
      piece.body = documents_.cut(document.number, begin, piece.body, room == rules_.capacity);
    }
    piece.padding = rules_.padding_after(piece.total());
    return piece;
  }

 private:
  struct BodySize {
    int64_t body = 0;
    int64_t repeated = 0;
    int64_t suffix = 0;
  };

  // What fits of the body and the suffix of a piece whose prefix is repeated; `left` is the room
  // behind the first one. Not inlined: plans without repetitions would be slower.
  template <Strategy kStrategy>
  __attribute__((noinline)) BodySize fit_repeated(const DocumentSize& document, int64_t begin,
                                                  int64_t left, bool must) const {
    BodySize piece;
    const int64_t every = rules_.repeat_every;
    const int64_t prefix = document.prefix;
    const int64_t rest = document.body - begin;
    const int64_t suffix = std::max(document.suffix, 0);
    const int64_t eod = suffix > 0 ? 1 : 0;  // behind the suffix
    // The most tokens of a body that fit `left` with the prefixes between them.
    const int64_t step = every + prefix;
    const int64_t fitting = left / step * every + std::min(left % step, every);
    const int64_t before = rest - eod;  // the suffix
    if (before <= fitting) {
      const int64_t repeated = repeats(before, every) * prefix;
      left -= before + repeated;
      if (kStrategy == Strategy::kTruncate || suffix + eod <= left) {
        piece.repeated = repeated;
        piece.suffix = std::min(suffix, left);
        piece.body = left > piece.suffix ? rest : before;
        return piece;
      }
    } else if (kStrategy == Strategy::kTruncate) {
      piece.body = fitting;
      piece.repeated = left - fitting;
      return piece;
    }
    piece.body = std::min(std::max<int64_t>(rest - 2 * eod, 0), fitting);
    if (piece.body < rest) {
      piece.body = documents_.cut(document.number, begin, piece.body, must);
    }
    piece.repeated = repeats(piece.body, every) * prefix;
    return piece;
  }

  const Documents& documents_;
  const PackRules rules_;
  const int64_t bos_;
};

// A prefix or suffix that a piece shows.
struct ShownText {
  int32_t id = -1;
  int32_t tokens = 0;  // fewer than the text has where the pack ends inside it
};

// A piece with what is needed to write its tokens.
struct Piece {
  int64_t document = 0;
  int64_t body = 0;  // tokens of the whole body
  int64_t body_begin = 0;
  int64_t body_end = 0;
  ShownText prefix;
  ShownText suffix;
  int64_t repeat_every = 0;  // of the prefix
  int32_t cut_repeat = 0;    // tokens of a repeated prefix that ends the pack
  int32_t padding = 0;
  bool has_bos = false;

  // Tokens of the body behind the suffix: its EOD.
  int64_t behind_suffix() const { return suffix.tokens > 0 && body_end == body ? 1 : 0; }
  // Tokens without padding.
  int64_t content() const {
    const int64_t tokens = body_end - body_begin;
    return (has_bos ? 1 : 0) + prefix.tokens + tokens + suffix.tokens + cut_repeat +
           repeats(tokens - behind_suffix(), repeat_every) * prefix.tokens;
  }
};

// A repeated prefix is never in the loss.
enum class TokenKind { kBos, kPrefix, kRepeated, kBody, kSuffix };
const char* name_of(TokenKind kind);

// Calls visit(kind, count) for each run of tokens of one kind in a piece, from left to right; the
// padding is not among them. The runs of the body may be empty.
template <typename Visit>
void for_each_run(const Piece& piece, Visit&& visit) {
  if (piece.has_bos) visit(TokenKind::kBos, 1);
  if (piece.prefix.tokens > 0) visit(TokenKind::kPrefix, int64_t{piece.prefix.tokens});
  const int64_t eod = piece.behind_suffix();
  int64_t body = piece.body_end - piece.body_begin - eod;
  if (piece.repeat_every > 0 && piece.prefix.tokens > 0) {
    for (; body > piece.repeat_every; body -= piece.repeat_every) {
      visit(TokenKind::kBody, piece.repeat_every);
      visit(TokenKind::kRepeated, int64_t{piece.prefix.tokens});
    }
  }
  visit(TokenKind::kBody, body);
  if (piece.cut_repeat > 0) visit(TokenKind::kRepeated, int64_t{piece.cut_repeat});
  if (piece.suffix.tokens == 0) return;
  visit(TokenKind::kSuffix, int64_t{piece.suffix.tokens});
  visit(TokenKind::kBody, eod);
}

}  // namespace meco
