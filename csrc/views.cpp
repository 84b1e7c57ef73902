#include "views.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "permutation.h"

namespace meco {

namespace {

int64_t body_of(const Piece& piece) { return piece.body_end - piece.body_begin; }

const int32_t* tokens_of(const ShownText& text, const TextTable& table) {
  return table.first_tokens(text.id, text.tokens);
}

// By their tokens: two texts may have the same.
bool is_same(const ShownText& a, const ShownText& b, const TextTable& table) {
  if (a.tokens != b.tokens) return false;
  if (a.id == b.id) return true;
  const int32_t* tokens = tokens_of(a, table);
  return std::equal(tokens, tokens + a.tokens, tokens_of(b, table));
}

uint64_t hash_of(const ShownText& text, const TextTable& table, int64_t pack) {
  auto hash = static_cast<uint64_t>(pack);
  const int32_t* tokens = tokens_of(text, table);
  for (int32_t t = 0; t < text.tokens; ++t) {
    hash = hash_pair(hash, static_cast<uint64_t>(load(tokens, t)));
  }
  return hash;
}

void shuffle(TextOfPiece text, const TextTable& table, const PackRules& rules, int64_t pack,
             std::vector<Piece>* pieces) {
  if (table.ids == nullptr) return;
  const std::vector<Piece> own = *pieces;
  const std::vector<size_t> donors = shuffled_texts(own, text, table, rules, pack);
  for (size_t i = 0; i < own.size(); ++i) {
    Piece& piece = (*pieces)[i];
    piece.*text = own[donors[i]].*text;
    piece.padding = static_cast<int32_t>(rules.padding_after(piece.content()));
  }
}

}  // namespace

View parse_view(const std::string& name) {
  if (name == "conditioned") return View::kConditioned;
  if (name == "plain") return View::kPlain;
  if (name == "shuffled") return View::kShuffled;
  throw std::invalid_argument("unknown view: " + name);
}

std::vector<size_t> shuffled_texts(const std::vector<Piece>& pieces, TextOfPiece text,
                                   const TextTable& table, const PackRules& rules, int64_t pack) {
  std::vector<size_t> donors(pieces.size());
  std::vector<std::pair<uint64_t, size_t>> order;  // equal texts side by side
  int64_t room = rules.capacity;                   // that the sorted pieces share
  for (size_t i = 0; i < pieces.size(); ++i) {
    donors[i] = i;
    const Piece& piece = pieces[i];
    const ShownText& own = piece.*text;
    const bool is_whole =
        own.tokens > 0 && own.tokens == table.length(own.id) && piece.cut_repeat == 0;
    if (is_whole && body_of(piece) > 0) {
      order.emplace_back(hash_of(own, table, pack), i);
    } else {
      room -= piece.content() + piece.padding;
    }
  }
  std::sort(order.begin(), order.end());
  size_t most = 0;
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    for (end = begin; end < order.size() && order[end].first == order[begin].first;) ++end;
    most = std::max(most, end - begin);
  }
  const size_t count = order.size();
  auto donor = [&](size_t i, size_t places) { return order[(i + places) % count].second; };
  auto fits = [&](size_t places) {
    if (rules.alignment == 1 && rules.repeat_every == 0) return true;
    int64_t tokens = 0;
    for (size_t i = 0; i < count; ++i) {
      Piece piece = pieces[order[i].second];
      piece.*text = pieces[donor(i, places)].*text;
      tokens += piece.content() + rules.padding_after(piece.content());
    }
    return tokens <= room;
  };
  const size_t last = count - most;
  for (size_t places = most;; places < last ? ++places : --places) {
    if (fits(places)) {
      for (size_t i = 0; i < count; ++i) donors[order[i].second] = donor(i, places);
      break;
    }
    if (places == last) break;
  }
  return donors;
}

void show(View view, const PackRules& rules, const Documents& documents, int64_t pack,
          std::vector<Piece>* pieces) {
  if (view == View::kPlain) {
    for (Piece& piece : *pieces) {
      piece.prefix = piece.suffix = {};
      piece.repeat_every = piece.cut_repeat = 0;
      piece.padding = static_cast<int32_t>(rules.padding_after(piece.content()));
    }
  } else if (view == View::kShuffled) {
    shuffle(&Piece::prefix, documents.prefixes, rules, pack, pieces);
    shuffle(&Piece::suffix, documents.suffixes, rules, pack, pieces);
  }
}

void mark_compared(View view, const PackRules& rules, const Documents& documents, int64_t pack,
                   const std::vector<Piece>& pieces, float* compared) {
  std::vector<Piece> shuffled = pieces;
  show(View::kShuffled, rules, documents, pack, &shuffled);
  std::vector<Piece> shown = pieces;
  show(view, rules, documents, pack, &shown);
  std::fill(compared, compared + rules.capacity, 0.0f);
  int64_t begin = 0;  // of the piece
  for (size_t i = 0; i < shown.size(); ++i) {
    const Piece& piece = shown[i];
    int64_t cursor = begin;
    begin += piece.content() + piece.padding;
    if (begin > rules.capacity) throw std::out_of_range("damaged plan: pack overfull");
    if (is_same(pieces[i].prefix, shuffled[i].prefix, documents.prefixes) &&
        is_same(pieces[i].suffix, shuffled[i].suffix, documents.suffixes)) {
      continue;
    }
    bool leave_out = !piece.has_bos;
    for_each_run(piece, [&](TokenKind kind, int64_t count) {
      if (kind == TokenKind::kBody && count > 0) {
        // compared[t] governs the prediction of token t + 1, as loss_mask does.
        std::fill(compared + cursor - (leave_out ? 0 : 1), compared + cursor + count - 1, 1.0f);
        leave_out = false;
      }
      cursor += count;
    });
  }
}

}  // namespace meco
