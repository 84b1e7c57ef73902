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

std::vector<size_t> shuffled_prefixes(const std::vector<Piece>& pieces, const Documents& documents,
                                      int64_t pack) {
  std::vector<size_t> donors(pieces.size());
  std::vector<std::pair<uint64_t, size_t>> order;  // equal prefixes side by side
  for (size_t i = 0; i < pieces.size(); ++i) {
    donors[i] = i;
    const Piece& piece = pieces[i];
    const bool is_whole =
        piece.prefix_tokens > 0 && piece.prefix_tokens == documents.prefix_length(piece.prefix_id);
    if (is_whole && body_of(piece) > 0) {
      order.emplace_back(hash_of_prefix(piece, documents, pack), i);
    }
  }
  std::sort(order.begin(), order.end());
  size_t most = 0;
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    for (end = begin; end < order.size() && order[end].first == order[begin].first;) ++end;
    most = std::max(most, end - begin);
  }
  for (size_t i = 0; i < order.size(); ++i) {
    donors[order[i].second] = order[(i + most) % order.size()].second;
  }
  return donors;
}

void show(View view, const Documents& documents, int64_t pack, std::vector<Piece>* pieces) {
  if (view == View::kConditioned) return;
  if (view == View::kPlain) {
    for (Piece& piece : *pieces) {
      piece.prefix_id = -1;
      piece.prefix_tokens = 0;
    }
    return;
  }
  const std::vector<Piece> own = *pieces;
  const std::vector<size_t> donors = shuffled_prefixes(own, documents, pack);
  for (size_t i = 0; i < own.size(); ++i) {
    (*pieces)[i].prefix_id = own[donors[i]].prefix_id;
    (*pieces)[i].prefix_tokens = own[donors[i]].prefix_tokens;
  }
}

void mark_compared(View view, const Documents& documents, int64_t pack,
                   const std::vector<Piece>& pieces, int64_t capacity, float* compared) {
  const std::vector<size_t> donors = shuffled_prefixes(pieces, documents, pack);
  std::vector<Piece> shown = pieces;
  show(view, documents, pack, &shown);
  std::fill(compared, compared + capacity, 0.0f);
  int64_t end = 0;
  for (size_t i = 0; i < shown.size(); ++i) {
    const int64_t begin = end + (shown[i].has_bos ? 1 : 0) + shown[i].prefix_tokens;
    end = begin + body_of(shown[i]);
    if (end > capacity) throw std::out_of_range("damaged plan: pack overfull");
    if (same_prefix(pieces[i], pieces[donors[i]], documents)) continue;
    // compared[t] governs the prediction of token t + 1, as loss_mask does.
    std::fill(compared + begin - (shown[i].has_bos ? 1 : 0), compared + end - 1, 1.0f);
  }
}

}  // namespace meco
