#include "assemble.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace meco {

namespace {

int64_t continued_begin_of(const PlanView& plan, int64_t piece) {
  const int64_t* end = plan.continued_piece + plan.num_continued;
  const int64_t* found = std::lower_bound(plan.continued_piece, end, piece);
  return found != end && *found == piece ? plan.continued_begin[found - plan.continued_piece] : 0;
}

template <typename Token>
void widen(const uint8_t* source, int64_t count, int64_t* target) {
  for (int64_t i = 0; i < count; ++i) {
    Token token;  // memcpy: the file gives no alignment
    std::memcpy(&token, source + i * static_cast<int64_t>(sizeof(Token)), sizeof(Token));
    target[i] = static_cast<int64_t>(token);
  }
}

void copy_tokens(const uint8_t* source, int token_bytes, int64_t count, int64_t* target) {
  switch (token_bytes) {
    case 2:  // Megatron's uint16
      return widen<uint16_t>(source, count, target);
    case 4:  // int32
      return widen<int32_t>(source, count, target);
    case 8:  // int64
      return widen<int64_t>(source, count, target);
    default:
      throw std::invalid_argument("tokens must be 2, 4 or 8 bytes wide");
  }
}

void count_up(int64_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = i;
}

}  // namespace

std::vector<Piece> pieces_of_pack(const PlanView& plan, const Documents& documents, int64_t pack,
                                  const AssemblyOptions& options) {
  if (pack < 0 || pack >= plan.num_packs) throw std::out_of_range("pack number out of range");
  const int64_t begin = plan.pack_offsets[pack];
  const int64_t end = plan.pack_offsets[pack + 1];
  if (begin < 0 || begin > end || end > plan.num_pieces || end - begin > options.max_documents) {
    throw std::out_of_range("damaged plan: pack offsets");
  }
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(end - begin));
  int64_t room = options.capacity;
  for (int64_t p = begin; p < end; ++p) {
    Piece piece;
    piece.document = plan.piece_document[p];
    if (piece.document < 0 || piece.document >= documents.num_documents) {
      throw std::out_of_range("damaged plan: document number");
    }
    const int64_t body = documents.body_length(piece.document);
    piece.body_begin = continued_begin_of(plan, p);
    if (piece.body_begin < 0 || piece.body_begin >= body) {
      throw std::out_of_range("damaged plan: body offset");
    }
    piece.has_bos = documents.has_bos && room > 0;
    piece.prefix_id = documents.prefix_id(piece.document);
    if (piece.body_begin > 0 && !options.repeat_prefix) piece.prefix_id = -1;
    const bool is_empty_pack = room == options.capacity;
    // Best-fit cuts every body as for a pack of its own, the others as the room left demands.
    int64_t left = options.strategy == Strategy::kBestFit ? options.capacity : room;
    left -= piece.has_bos ? 1 : 0;
    const int64_t prefix = std::min(documents.prefix_length(piece.prefix_id), left);
    left -= prefix;
    int64_t taken = std::min(body - piece.body_begin, left);
    if (taken < body - piece.body_begin && options.strategy != Strategy::kTruncate) {
      const bool must = is_empty_pack || options.strategy == Strategy::kBestFit;
      taken = documents.cut(piece.document, piece.body_begin, taken, must);
    }
    piece.body_end = piece.body_begin + taken;
    room -= (piece.has_bos ? 1 : 0) + prefix + taken;
    if (room < 0) throw std::out_of_range("damaged plan: pack overfull");
    // The body is cut as if the prefix were there: both views hold the same body tokens.
    if (options.hide_prefixes) piece.prefix_id = -1;
    piece.prefix_tokens = options.hide_prefixes ? 0 : static_cast<int32_t>(prefix);
    pieces.push_back(piece);
  }
  return pieces;
}

void assemble(const std::vector<Piece>& pieces, const std::vector<const uint8_t*>& sources,
              int token_bytes, const Documents& documents, const int32_t* prefix_tokens,
              const AssemblyOptions& options, SampleArrays* out) {
  const int64_t capacity = options.capacity;
  int64_t cursor = 0;
  int64_t longest = 0;
  int64_t num_bounds = 0;
  int64_t prefix_total = 0;
  out->cu_seqlens[num_bounds++] = 0;

  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    const int64_t body = piece.body_end - piece.body_begin;
    const int64_t head = (piece.has_bos ? 1 : 0) + piece.prefix_tokens;
    const int64_t begin = cursor;
    const int64_t end = begin + head + body;
    if (body < 0 || end > capacity) throw std::out_of_range("damaged plan: pack overfull");

    int64_t* tokens = out->tokens + begin;
    if (piece.has_bos) *tokens++ = options.bos_id;
    const int32_t* prefix = piece.prefix_tokens > 0
                                ? prefix_tokens + documents.prefix_offsets[piece.prefix_id]
                                : nullptr;
    for (int32_t k = 0; k < piece.prefix_tokens; ++k) *tokens++ = prefix[k];
    copy_tokens(sources[i], token_bytes, body, tokens);

    // loss_mask[t] governs predicting token t + 1, which must be trained and in the same piece.
    const int64_t first_trained = std::max(
        begin + 1, options.train_on_prefix ? begin + (piece.has_bos ? 1 : 0) : begin + head);
    std::fill(out->loss_mask + begin, out->loss_mask + end, 0.0f);
    if (first_trained < end) {
      std::fill(out->loss_mask + first_trained - 1, out->loss_mask + end - 1, 1.0f);
    }
    count_up(out->position_ids + begin, end - begin);
    prefix_total += piece.prefix_tokens;
    longest = std::max(longest, end - begin);
    cursor = end;
    if (end > begin) out->cu_seqlens[num_bounds++] = static_cast<int32_t>(end);
  }

  // Padding is a segment of its own: no document sees it, and nothing in it is trained.
  longest = std::max(longest, capacity - cursor);
  std::fill(out->tokens + cursor, out->tokens + capacity + 1, options.pad_id);
  std::fill(out->loss_mask + cursor, out->loss_mask + capacity, 0.0f);
  count_up(out->position_ids + cursor, capacity - cursor);
  for (; num_bounds < num_cu_seqlens(options); ++num_bounds) {
    out->cu_seqlens[num_bounds] = static_cast<int32_t>(capacity);
  }
  *out->max_seqlen = static_cast<int32_t>(longest);
  *out->prefix_tokens = prefix_total;
}

}  // namespace meco
