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

MECO_VECTOR_CLONES void count_up(int64_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = i;
}

// Writes the arrays of one sample from left to right, segment after segment. A segment is what
// attends to itself alone: a piece, or the padding.
class SampleWriter {
 public:
  SampleWriter(const AssemblyOptions& options, SampleArrays* out)
      : capacity_(options.capacity), num_bounds_(num_cu_seqlens(options)), out_(*out) {
    out_.cu_seqlens[0] = 0;
  }

  int64_t room() const { return capacity_ - cursor_; }

  // Adds tokens to the open segment and returns where they are to be written. `trained`: whether
  // the loss counts their prediction; that of a segment's first token is never counted.
  int64_t* append(int64_t count, bool trained) {
    if (count < 0 || count > room()) throw std::out_of_range("damaged plan: pack overfull");
    int64_t* tokens = out_.tokens + cursor_;
    // loss_mask[t] governs the prediction of token t + 1.
    const int64_t first = std::max(cursor_, segment_ + 1);
    cursor_ += count;
    if (first < cursor_) {
      std::fill(out_.loss_mask + first - 1, out_.loss_mask + cursor_ - 1, trained ? 1.0f : 0.0f);
    }
    return tokens;
  }

  void pad(int64_t count, int64_t pad_id) {
    int64_t* tokens = append(count, false);
    std::fill(tokens, tokens + count, pad_id);
  }

  void end_segment() {
    if (cursor_ == segment_) return;
    out_.loss_mask[cursor_ - 1] = 0.0f;  // the next token is not in this segment
    count_up(out_.position_ids + segment_, cursor_ - segment_);
    longest_ = std::max(longest_, cursor_ - segment_);
    out_.cu_seqlens[++bound_] = static_cast<int32_t>(cursor_);
    segment_ = cursor_;
  }

  // Fills the rest of the pack and of cu_seqlens.
  void finish(int64_t pad_id) {
    pad(room(), pad_id);
    out_.tokens[capacity_] = pad_id;
    end_segment();
    std::fill(out_.cu_seqlens + bound_ + 1, out_.cu_seqlens + num_bounds_,
              static_cast<int32_t>(capacity_));
    *out_.max_seqlen = static_cast<int32_t>(longest_);
  }

 private:
  const int64_t capacity_;
  const int64_t num_bounds_;
  const SampleArrays out_;
  int64_t cursor_ = 0;   // where the next token goes
  int64_t segment_ = 0;  // where the open segment begins
  int64_t bound_ = 0;    // last entry of cu_seqlens that is written
  int64_t longest_ = 0;
};

}  // namespace

AssemblyOptions check(const AssemblyOptions& options) {
  AssemblyOptions checked = options;
  check(static_cast<PackRules*>(&checked));
  if (options.vocab_size < 1) throw std::invalid_argument("vocab_size must be at least 1");
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
  const Layout layout(documents, options);
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(end - begin));
  int64_t room = options.capacity;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t number = load(plan.piece_document, p);
    if (number < 0 || number >= documents.num_documents) {
      throw std::out_of_range("damaged plan: document number");
    }
    const DocumentSize document = documents.size_of(number);
    const int64_t body_begin = continued_begin_of(plan, p);
    if (body_begin < 0 || body_begin >= document.body) {
      throw std::out_of_range("damaged plan: body offset");
    }
    const PieceSize size = layout.fit(document, body_begin, room);
    room -= size.total();
    if (room < 0) throw std::out_of_range("damaged plan: pack overfull");
    Piece piece;
    piece.document = number;
    piece.body = document.body;
    piece.body_begin = body_begin;
    piece.body_end = body_begin + size.body;
    piece.padding = static_cast<int32_t>(size.padding);
    piece.has_bos = size.bos > 0;
    if (layout.shows_prefix(body_begin)) {
      piece.prefix = {documents.text_id(documents.prefixes, number),
                      static_cast<int32_t>(size.prefix)};
    }
    piece.suffix = {documents.text_id(documents.suffixes, number),
                    static_cast<int32_t>(size.suffix)};
    if (size.repeated > 0) {
      piece.repeat_every = options.repeat_every;
      const int64_t between =
          repeats(size.body - piece.behind_suffix(), options.repeat_every) * size.prefix;
      piece.cut_repeat = static_cast<int32_t>(size.repeated - between);
    }
    pieces.push_back(piece);
  }
  // Only now: what a view hides or moves takes up its room all the same.
  show(options.view, options, documents, pack, &pieces);
  return pieces;
}

void compared_of_pack(const PlanView& plan, const Documents& documents, int64_t pack,
                      const AssemblyOptions& options, float* compared) {
  AssemblyOptions conditioned = options;
  conditioned.view = View::kConditioned;
  mark_compared(options.view, options, documents, pack,
                pieces_of_pack(plan, documents, pack, conditioned), compared);
}

void assemble(const std::vector<Piece>& pieces, const std::vector<const uint8_t*>& sources,
              int token_bytes, const Documents& documents, const AssemblyOptions& options,
              SampleArrays* out) {
  SampleWriter writer(options, out);
  *out->prefix_tokens = 0;
  auto write_text = [&](const TextTable& table, int32_t id, int64_t count, bool trained) {
    const auto* source = reinterpret_cast<const uint8_t*>(table.first_tokens(id, count));
    int64_t* target = writer.append(count, trained);
    check_vocabulary(widen<int32_t>(source, count, target), options);
    *out->prefix_tokens += count;
  };
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    const uint8_t* source = sources[i];
    for_each_run(piece, [&](TokenKind kind, int64_t count) __attribute__((noinline)) {
      switch (kind) {
        case TokenKind::kBos:
          *writer.append(count, false) = options.bos_id;
          break;
        case TokenKind::kPrefix:
          write_text(documents.prefixes, piece.prefix.id, count, options.train_on_prefix);
          break;
        case TokenKind::kRepeated:
          write_text(documents.prefixes, piece.prefix.id, count, false);
          break;
        case TokenKind::kBody:
          check_vocabulary(copy_tokens(source, token_bytes, count, writer.append(count, true)),
                           options);
          source += count * token_bytes;
          break;
        case TokenKind::kSuffix:
          write_text(documents.suffixes, piece.suffix.id, count, options.train_on_suffix);
          break;
      }
    });
    if (piece.padding > 0) writer.pad(piece.padding, options.pad_id);
    writer.end_segment();
  }
  writer.finish(options.pad_id);
}

}  // namespace meco
