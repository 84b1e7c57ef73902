#include "assemble.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "vector_clones.h"

namespace meco {

namespace {

int64_t continued_begin_of(const PlanView& plan, int64_t piece) {
  const int64_t* end = plan.continued_piece + plan.num_continued;
  const int64_t* found = std::lower_bound(plan.continued_piece, end, piece);
  return found != end && *found == piece ? plan.continued_begin[found - plan.continued_piece] : 0;
}

// Widens and returns the largest id, one below zero counted as larger than any. Inlined, so that it
// is compiled for the instructions that its caller may use.
template <typename Token>
inline __attribute__((always_inline)) uint64_t widen(const uint8_t* source, int64_t count,
                                                     int64_t* target) {
  using Unsigned = std::make_unsigned_t<Token>;
  Unsigned largest = 0;
  const auto* tokens = reinterpret_cast<const Token*>(source);
  for (int64_t i = 0; i < count; ++i) {
    const Token token = load(tokens, i);
    largest = std::max(largest, static_cast<Unsigned>(token));
    target[i] = static_cast<int64_t>(token);
  }
  return largest;
}

MECO_VECTOR_CLONES uint64_t copy_tokens(const uint8_t* source, int token_bytes, int64_t count,
                                        int64_t* target) {
  switch (token_bytes) {
    case 1:
      return widen<uint8_t>(source, count, target);
    case 2:  // Megatron's uint16
      return widen<uint16_t>(source, count, target);
    case 4:  // int32
      return widen<int32_t>(source, count, target);
    default:  // int64
      return widen<int64_t>(source, count, target);
  }
}

void check_vocabulary(uint64_t largest, const AssemblyOptions& options) {
  if (largest < static_cast<uint64_t>(options.vocab_size)) return;
  throw std::domain_error("token id " + std::to_string(static_cast<int64_t>(largest)) +
                          " outside the vocabulary of " + std::to_string(options.vocab_size));
}

void count_up(int64_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = i;
}

}  // namespace

AssemblyOptions check(const AssemblyOptions& options) {
  if (options.capacity < 2 || options.capacity > kMaxCapacity) {
    throw std::invalid_argument("capacity must be 2 to 67,108,864");
  }
  if (options.max_documents < 1) throw std::invalid_argument("max_documents must be at least 1");
  if (options.vocab_size < 1) throw std::invalid_argument("vocab_size must be at least 1");
  AssemblyOptions checked = options;
  checked.max_documents = std::min(options.max_documents, options.capacity);
  return checked;
}

void check_token_bytes(int token_bytes) {
  if (token_bytes != 1 && token_bytes != 2 && token_bytes != 4 && token_bytes != 8) {
    throw std::invalid_argument("tokens must be 1, 2, 4 or 8 bytes wide");
  }
}

const uint8_t* locate(const TokenFile& file, const Documents& documents, const Piece& piece) {
  const auto [first, last] = documents.sequences_of(piece.document);
  if (last > file.num_sequences) throw std::out_of_range("sequence out of range");
  if (first == last) return file.bytes;  // nothing to read
  const int64_t begin = load(file.sequence_pointers, first);
  const int64_t end = load(file.sequence_pointers, last - 1);
  const int64_t width = file.token_bytes;
  // All pointers first, then sums: those of a damaged index could overflow.
  if (begin < 0 || end < begin || end > file.num_bytes) {
    throw std::out_of_range("damaged index: a sequence begins outside of the .bin file");
  }
  const int64_t tail = load(documents.sequence_lengths, last - 1);
  if (tail < 0 || tail > (file.num_bytes - end) / width) {
    throw std::out_of_range("damaged index: a document ends behind the .bin file");
  }
  if (piece.body > file.num_bytes / width || end - begin + tail * width != piece.body * width) {
    throw std::out_of_range("damaged index: pointers and lengths of a document disagree");
  }
  if (piece.body_begin < 0 || piece.body_end < piece.body_begin || piece.body_end > piece.body) {
    throw std::out_of_range("damaged plan: body offset");
  }
  return file.bytes + begin + piece.body_begin * width;
}

std::vector<Piece> pieces_of_pack(const PlanView& plan, const Documents& documents, int64_t pack,
                                  const AssemblyOptions& options) {
  if (pack < 0 || pack >= plan.num_packs) throw std::out_of_range("pack number out of range");
  const int64_t begin = load(plan.pack_offsets, pack);
  const int64_t end = load(plan.pack_offsets, pack + 1);
  if (begin < 0 || begin > end || end > plan.num_pieces || end - begin > options.max_documents) {
    throw std::out_of_range("damaged plan: pack offsets");
  }
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(end - begin));
  int64_t room = options.capacity;
  for (int64_t p = begin; p < end; ++p) {
    Piece piece;
    piece.document = load(plan.piece_document, p);
    if (piece.document < 0 || piece.document >= documents.num_documents) {
      throw std::out_of_range("damaged plan: document number");
    }
    const int64_t body = documents.body_length(piece.document);
    piece.body = body;
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
    if (piece.prefix_tokens > 0) {
      if (piece.prefix_tokens > documents.prefix_length(piece.prefix_id)) {
        throw std::out_of_range("damaged prefix table: offsets");
      }
      const int32_t* prefix = prefix_tokens + documents.prefix_begin(piece.prefix_id);
      const auto* bytes = reinterpret_cast<const uint8_t*>(prefix);
      check_vocabulary(widen<int32_t>(bytes, piece.prefix_tokens, tokens), options);
      tokens += piece.prefix_tokens;
    }
    check_vocabulary(copy_tokens(sources[i], token_bytes, body, tokens), options);

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
