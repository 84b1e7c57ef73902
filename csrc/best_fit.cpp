#include "best_fit.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "permutation.h"

namespace meco {

namespace {

// Pieces of one window are numbered with 32 bits.
constexpr size_t kMaxWindowPieces = size_t{1} << 27;

// Step 3 of best-fit, see best_fit.h.
class BestFitDecreasing {
 public:
  BestFitDecreasing(int64_t capacity, int64_t max_pieces)
      : capacity_(capacity),
        max_pieces_(max_pieces),
        groups_(static_cast<size_t>(capacity) + 1),
        rooms_(static_cast<size_t>(capacity / 64) + 1) {}

  // Writes the pack of each piece, largest piece first. Returns the number of packs.
  int64_t place(const std::vector<int32_t>& count_of_size, int32_t* pack_of_rank) {
    next_ = pack_of_rank;
    int64_t tokens = 0;
    int64_t pieces = 0;
    for (int64_t size = 1; size <= capacity_; ++size) {
      const int64_t count = count_of_size[static_cast<size_t>(size)];
      tokens += count * size;
      pieces += count;
      if (size * max_pieces_ < capacity_) room_wanted_ = tokens;
    }
    fewest_packs_ =
        std::max((tokens + capacity_ - 1) / capacity_, (pieces + max_pieces_ - 1) / max_pieces_);
    holds_back_ = room_wanted_ > 0;
    for (int64_t size = capacity_; size > 0; --size) {
      place_run(size, count_of_size[static_cast<size_t>(size)]);
    }
    return num_packs_;
  }

 private:
  // Packs [first, first + count), all with the same room and the same number of pieces.
  struct Group {
    int32_t first;
    int32_t count;
    int32_t pieces;  // in each pack

    // The first `num` packs, each with `more` pieces; they leave this group.
    Group split_off(int32_t num, int64_t more) {
      const Group front{first, num, pieces + static_cast<int32_t>(more)};
      first += num;
      count -= num;
      return front;
    }
  };

  // Places `left` pieces of one size.
  void place_run(int64_t size, int64_t left) {
    while (left > 0) {
      int64_t room = smallest_room(size);
      if (room < 0 && holds_back_ && num_packs_ == fewest_packs_) {
        release();
        continue;
      }
      Group group;
      if (room < 0) {
        room = capacity_;
        group = open_packs(size, left);
      } else {
        group = pop(room);
      }
      const int64_t each = std::min(room / size, max_pieces_ - group.pieces);
      const auto whole = static_cast<int32_t>(std::min<int64_t>(group.count, left / each));
      assign(group.first, whole, each);
      left -= whole * each;
      receive(room - each * size, group.split_off(whole, each));
      if (group.count > 0 && left > 0 && left < each) {
        assign(group.first, 1, left);
        receive(room - left * size, group.split_off(1, left));
        left = 0;
      }
      if (group.count > 0) push(room, group);
    }
  }

  // As many packs as a run of pieces needs, but no more than the fewest while packs are held back.
  Group open_packs(int64_t size, int64_t pieces) {
    const int64_t each = std::min(capacity_ / size, max_pieces_);
    int64_t count = (pieces + each - 1) / each;
    if (holds_back_) count = std::min(count, fewest_packs_ - num_packs_);
    const Group group{static_cast<int32_t>(num_packs_), static_cast<int32_t>(count), 0};
    num_packs_ += count;
    return group;
  }

  void assign(int32_t first, int32_t num_packs, int64_t each) {
    for (int32_t pack = first; pack < first + num_packs; ++pack) {
      for (int64_t i = 0; i < each; ++i) *next_++ = pack;
    }
  }

  // Takes back packs that were just given pieces: closed, set aside or open for more.
  void receive(int64_t room, Group group) {
    if (group.count == 0 || room == 0 || group.pieces >= max_pieces_) return;
    if (holds_back_ && room_wanted_ > 0 && room <= capacity_ / 4) {
      const int64_t wanted = (room_wanted_ + room - 1) / room;
      const auto count = static_cast<int32_t>(std::min<int64_t>(group.count, wanted));
      set_aside_.emplace_back(room, group.split_off(count, 0));
      room_wanted_ -= count * room;
    }
    if (group.count > 0) push(room, group);
  }

  void release() {
    holds_back_ = false;
    for (const auto& [room, group] : set_aside_) push(room, group);
  }

  void push(int64_t room, Group group) {
    groups_[static_cast<size_t>(room)].push_back(group);
    rooms_[static_cast<size_t>(room / 64)] |= uint64_t{1} << (room % 64);
  }

  Group pop(int64_t room) {
    std::vector<Group>& stack = groups_[static_cast<size_t>(room)];
    const Group group = stack.back();
    stack.pop_back();
    if (stack.empty()) rooms_[static_cast<size_t>(room / 64)] &= ~(uint64_t{1} << (room % 64));
    return group;
  }

  // The smallest room of an open pack that holds `size` tokens, or -1.
  int64_t smallest_room(int64_t size) const {
    auto word = static_cast<size_t>(size / 64);
    uint64_t bits = rooms_[word] & (~uint64_t{0} << (size % 64));
    while (bits == 0) {
      if (++word == rooms_.size()) return -1;
      bits = rooms_[word];
    }
    return static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits);
  }

  int64_t capacity_;
  int64_t max_pieces_;
  std::vector<std::vector<Group>> groups_;            // by room
  std::vector<uint64_t> rooms_;                       // bit r: groups_[r] is not empty
  std::vector<std::pair<int64_t, Group>> set_aside_;  // with the room of each pack
  int64_t room_wanted_ = 0;   // tokens that are still to be set aside for tiny pieces
  int64_t fewest_packs_ = 0;  // that could hold all pieces
  bool holds_back_ = false;   // whether packs in set_aside_ are held back
  int64_t num_packs_ = 0;
  int32_t* next_ = nullptr;  // where the pack of the next piece is written
};

}  // namespace

std::unique_ptr<Window> WindowPacker::pack(const Walk& walk, const Task& task) const {
  std::unique_ptr<Window> window = take_spare();
  walk.read(task, &window->chunk);
  cut_documents(window.get());
  BestFitDecreasing packer(rules_.capacity, rules_.max_documents);
  window->pack_of_rank.resize(window->size.size());
  const int64_t num_packs = packer.place(window->count_of_size, window->pack_of_rank.data());
  const uint64_t stream =
      hash_pair(static_cast<uint64_t>(task.epoch), static_cast<uint64_t>(task.begin) + 1);
  order_pieces(num_packs, stream, window.get());
  return window;
}

void WindowPacker::recycle(std::unique_ptr<Window> window) const {
  const std::lock_guard<std::mutex> lock(spare_mutex_);
  spare_.push_back(std::move(window));
}

std::unique_ptr<Window> WindowPacker::take_spare() const {
  const std::lock_guard<std::mutex> lock(spare_mutex_);
  if (spare_.empty()) return std::make_unique<Window>();
  std::unique_ptr<Window> window = std::move(spare_.back());
  spare_.pop_back();
  return window;
}

// Step 1, and the counts of step 2.
void WindowPacker::cut_documents(Window* w) const {
  w->document.clear();
  w->size.clear();
  w->begin.clear();
  w->count_of_size.assign(static_cast<size_t>(rules_.capacity) + 1, 0);
  w->tokens = {};
  w->documents = w->documents_cut = w->documents_plain = w->documents_empty = 0;
  const bool has_table = documents_.has_metadata();
  for (size_t i = 0; i < w->chunk.size(); ++i) {
    const DocumentSize document = w->chunk[i];
    if (document.body <= 1) {  // nothing but EOD
      ++w->documents_empty;
      continue;
    }
    ++w->documents;
    w->documents_plain += has_table && document.is_plain() ? 1 : 0;
    for (int64_t begin = 0; begin < document.body;) {
      const PieceSize piece = layout_.fit(document, begin, rules_.capacity);
      if (piece.body <= 0) throw std::out_of_range("damaged prefix table: no room for a body");
      if (w->size.size() == kMaxWindowPieces) {
        throw std::length_error("too many pieces: the documents are far longer than a pack");
      }
      const int64_t size = piece.total();
      w->document.push_back(static_cast<int32_t>(document.number));
      w->size.push_back(static_cast<int32_t>(size));
      w->begin.push_back(begin);
      ++w->count_of_size[static_cast<size_t>(size)];
      w->tokens.bos += piece.bos;
      w->tokens.prefix += piece.prefix;
      w->tokens.repeated += piece.repeated;
      w->tokens.suffix += piece.suffix;
      w->tokens.body += piece.body;
      w->tokens.padding += piece.padding;
      w->documents_cut += begin == 0 && piece.body < document.body ? 1 : 0;
      begin += piece.body;
    }
  }
}

// Steps 2 and 4: each piece has a rank by size, the rank a pack, and the pack a place.
void WindowPacker::order_pieces(int64_t num_packs, uint64_t stream, Window* w) const {
  w->next_rank.resize(w->count_of_size.size());
  int32_t rank = 0;
  for (size_t size = w->count_of_size.size(); size-- > 0;) {
    w->next_rank[size] = rank;
    rank += w->count_of_size[size];
  }

  const auto packs = static_cast<size_t>(num_packs);
  w->place_of_pack.resize(packs);
  if (packs > 0) Permutation(packs, seed_, stream).fill(0, num_packs, w->place_of_pack.data());
  w->pack_offsets.assign(packs + 1, 0);
  for (const int32_t pack : w->pack_of_rank) {
    ++w->pack_offsets[static_cast<size_t>(w->place_of_pack[static_cast<size_t>(pack)]) + 1];
  }
  for (size_t p = 0; p < packs; ++p) w->pack_offsets[p + 1] += w->pack_offsets[p];
  w->next_slot.resize(packs);
  for (size_t p = 0; p < packs; ++p) {
    w->next_slot[p] = w->pack_offsets[static_cast<size_t>(w->place_of_pack[p])];
  }

  const size_t pieces = w->size.size();
  w->piece_document.resize(pieces);
  w->piece_begin.assign(pieces, 0);
  for (size_t i = 0; i < pieces; ++i) {
    const int32_t piece_rank = w->next_rank[static_cast<size_t>(w->size[i])]++;
    const int32_t pack = w->pack_of_rank[static_cast<size_t>(piece_rank)];
    const auto slot = static_cast<size_t>(w->next_slot[static_cast<size_t>(pack)]++);
    w->piece_document[slot] = w->document[i];
    if (w->begin[i] > 0) w->piece_begin[slot] = w->begin[i];  // few are, and writes here are slow
  }
  w->continued.clear();
  for (size_t k = 0; k < pieces; ++k) {
    if (w->piece_begin[k] > 0) w->continued.push_back(static_cast<int32_t>(k));
  }
}

}  // namespace meco
