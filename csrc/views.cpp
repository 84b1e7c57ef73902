#include "views.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "permutation.h"

namespace meco {

namespace {

int64_t body_of(const Piece& piece) { return piece.body_end - piece.body_begin; }

const int32_t* prefix_tokens_of(const Piece& piece, const Documents& documents) {
  return documents.prefix(piece.prefix_id, piece.prefix_tokens);
}

// By their tokens: two texts may have the same.
bool same_prefix(const Piece& a, const Piece& b, const Documents& documents) {
  if (a.prefix_tokens != b.prefix_tokens) return false;
  if (a.prefix_id == b.prefix_id) return true;
  const int32_t* tokens = prefix_tokens_of(a, documents);
  return std::equal(tokens, tokens + a.prefix_tokens, prefix_tokens_of(b, documents));
}

uint64_t hash_of_prefix(const Piece& piece, const Documents& documents, int64_t pack) {
  auto hash = static_cast<uint64_t>(pack);
  const int32_t* tokens = prefix_tokens_of(piece, documents);
  for (int32_t t = 0; t < piece.prefix_tokens; ++t) {
    hash = hash_pair(hash, static_cast<uint64_t>(load(tokens, t)));
  }
  return hash;
}

}  // namespace

View parse_view(const std::string& name) {
  if (name == "conditioned") return View::kConditioned;
  if (name == "plain") return View::kPlain;
  if (name == "shuffled") return View::kShuffled;
  throw std::invalid_argument("unknown view: " + name);
}

std::vector<size_t> shuffled_prefixes(const std::vector<Piece>& pieces, const PackRules& rules,
                                      const Documents& documents, int64_t pack) {
  std::vector<size_t> donors(pieces.size());
  std::vector<std::pair<uint64_t, size_t>> order;  // equal prefixes side by side
  int64_t room = rules.capacity;                   // that the sorted pieces share
  for (size_t i = 0; i < pieces.size(); ++i) {
    donors[i] = i;
    const Piece& piece = pieces[i];
    const bool is_whole =
        piece.prefix_tokens > 0 && piece.prefix_tokens == documents.prefix_length(piece.prefix_id);
    if (is_whole && body_of(piece) > 0) {
      order.emplace_back(hash_of_prefix(piece, documents, pack), i);
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
    if (rules.alignment == 1) return true;
    int64_t tokens = 0;
    for (size_t i = 0; i < count; ++i) {
      const Piece& piece = pieces[order[i].second];
      const int64_t content =
          piece.content() - piece.prefix_tokens + pieces[donor(i, places)].prefix_tokens;
      tokens += content + rules.padding_after(content);
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
  if (view == View::kConditioned) return;
  const std::vector<Piece> own = *pieces;
  std::vector<size_t> donors;
  if (view == View::kShuffled) donors = shuffled_prefixes(own, rules, documents, pack);
  for (size_t i = 0; i < own.size(); ++i) {
    Piece& piece = (*pieces)[i];
    piece.prefix_id = donors.empty() ? -1 : own[donors[i]].prefix_id;
    piece.prefix_tokens = donors.empty() ? 0 : own[donors[i]].prefix_tokens;
    piece.padding = static_cast<int32_t>(rules.padding_after(piece.content()));
  }
}

void mark_compared(View view, const PackRules& rules, const Documents& documents, int64_t pack,
                   const std::vector<Piece>& pieces, float* compared) {
  const std::vector<size_t> donors = shuffled_prefixes(pieces, rules, documents, pack);
  std::vector<Piece> shown = pieces;
  show(view, rules, documents, pack, &shown);
  std::fill(compared, compared + rules.capacity, 0.0f);
  int64_t cursor = 0;
  for (size_t i = 0; i < shown.size(); ++i) {
    const Piece& piece = shown[i];
    const int64_t end = cursor + piece.content();  // of the body
    if (end + piece.padding > rules.capacity) {
      throw std::out_of_range("damaged plan: pack overfull");
    }
    cursor = end + piece.padding;
    if (same_prefix(pieces[i], pieces[donors[i]], documents)) continue;
    // compared[t] governs the prediction of token t + 1, as loss_mask does.
    const int64_t begin = end - body_of(piece) + (piece.has_bos ? 0 : 1);
    std::fill(compared + begin - 1, compared + end - 1, 1.0f);
  }
}

}  // namespace meco
