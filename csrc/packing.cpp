#include "packing.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "vector_clones.h"

namespace meco {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
// Documents that one thread looks up at a time: small enough for a cache, large enough to start a
// thread for.
constexpr int64_t kChunk = int64_t{1} << 16;
// Documents of one best-fit window. Padding is lost at the end of a window only.
constexpr int64_t kWindow = int64_t{1} << 18;
constexpr int64_t kPrefetch = 24;
// Pieces of one window: they are counted with 32 bits, one of which is a flag.
constexpr size_t kMaxWindowPieces = size_t{1} << 27;
constexpr int kMaxThreads = 256;  // more than any plan can keep busy

uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// One block of the permutation in 32-bit arithmetic, which gives the same low bits. The
// multiplications have no SSE2 form; where AVX2 is there, eight go at once.
MECO_VECTOR_CLONES void permute_block(uint32_t* x, int64_t count, uint32_t mask, int shift,
                                      const uint64_t* add, const uint64_t* multiply, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const auto a = static_cast<uint32_t>(add[round]);
    const auto m = static_cast<uint32_t>(multiply[round]);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t y = (x[i] + a) & mask;
      y = (y * m) & mask;
      x[i] = y ^ (y >> shift);
    }
  }
}

// A stretch of documents in order, with their lengths.
struct Chunk {
  std::vector<int64_t> document;
  std::vector<int64_t> body;
  std::vector<int32_t> prefix;  // tokens, -1: the document is plain
};

struct Task {
  int64_t epoch;
  int64_t begin;
  int64_t end;
};

// Walks the order of a phase, epoch after epoch, in tasks of equal size.
class Walk {
 public:
  Walk(const Documents& documents, const Order& order)
      : documents_(documents),
        order_(order),
        size_(order.range_end - order.range_begin),
        split_(static_cast<uint64_t>(order.num_documents), order.seed, 0) {}

  int64_t size() const { return size_; }

  Chunk read(const Task& task) const {
    Chunk chunk;
    read(task, &chunk);
    return chunk;
  }

  void read(const Task& task, Chunk* chunk) const {
    const int64_t count = task.end - task.begin;
    chunk->document.resize(static_cast<size_t>(count));
    chunk->body.resize(static_cast<size_t>(count));
    chunk->prefix.resize(static_cast<size_t>(count));
    place(task, chunk->document.data());
    read_lengths(chunk->document.data(), count, chunk->body.data());
    read_prefixes(chunk->document.data(), count, chunk->prefix.data());
  }

 private:
  void place(const Task& task, int64_t* document) const {
    const int64_t count = task.end - task.begin;
    // The first epoch walks the split's own permutation, which is random already.
    if (task.epoch == 0) {
      split_.fill(static_cast<uint64_t>(order_.range_begin + task.begin), count, document);
    } else {
      const Permutation epoch(static_cast<uint64_t>(size_), order_.seed,
                              static_cast<uint64_t>(task.epoch));
      epoch.fill(static_cast<uint64_t>(task.begin), count, document);
      for (int64_t i = 0; i < count; ++i) {
        document[i] =
            static_cast<int64_t>(split_(static_cast<uint64_t>(order_.range_begin + document[i])));
      }
    }
    for (int64_t i = 0; i < count; ++i) document[i] += order_.first_document;
  }

  // Lengths lie anywhere in memory: ask for each some places ahead.
  void read_lengths(const int64_t* document, int64_t count, int64_t* body) const {
    if (documents_.document_indices != nullptr) {
      for (int64_t i = 0; i < count; ++i) body[i] = documents_.body_length(document[i]);
      return;
    }
    const int32_t* lengths = documents_.sequence_lengths;
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(lengths + document[std::min(i + kPrefetch, count - 1)]);
      body[i] = load(lengths, document[i]);
      all |= body[i];
    }
    if (all < 0) throw std::out_of_range("damaged index: a length below zero");
  }

  void read_prefixes(const int64_t* document, int64_t count, int32_t* prefix) const {
    if (documents_.prefix_ids == nullptr) {
      std::fill(prefix, prefix + count, -1);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(documents_.prefix_ids + document[std::min(i + kPrefetch, count - 1)]);
      const int32_t id = documents_.prefix_id(document[i]);
      prefix[i] = id < 0 ? -1 : static_cast<int32_t>(documents_.prefix_length(id));
    }
  }

  const Documents& documents_;
  Order order_;
  int64_t size_;
  Permutation split_;
};

// Bytes that a plan may take: a third of this machine's memory, because vectors grow by moving.
int64_t memory_limit() {
  static const int64_t limit = int64_t{sysconf(_SC_PHYS_PAGES)} / 3 * sysconf(_SC_PAGESIZE);
  return limit;
}

// A pack under construction, and the plan it goes into.
class Builder {
 public:
  Builder(const Documents& documents, const PackingOptions& options, int64_t expected_pieces)
      : documents_(documents), options_(options), bos_(documents.has_bos ? 1 : 0) {
    plan_.pack_offsets.push_back(0);
    // Memory that is never touched costs nothing, moving a grown array does.
    plan_.piece_document.reserve(static_cast<size_t>(expected_pieces));
    plan_.packs_by_size.resize(static_cast<size_t>(options.max_documents) + 1);
  }

  bool done() const {
    return options_.num_packs >= 0 &&
           static_cast<int64_t>(plan_.pack_offsets.size()) > options_.num_packs;
  }
  int64_t num_packs() const { return static_cast<int64_t>(plan_.pack_offsets.size()) - 1; }
  int64_t num_pieces() const { return static_cast<int64_t>(plan_.piece_document.size()); }
  Plan& plan() { return plan_; }
  PlanCounts& counts() { return plan_.counts; }
  int64_t bos() const { return bos_; }

  void close_pack(int64_t used) {
    const int64_t pieces = num_pieces() - plan_.pack_offsets.back();
    plan_.counts.padding_tokens += options_.capacity - used;
    // Now and then is enough: in between a plan grows by little.
    if (plan_.pack_offsets.size() % (size_t{1} << 16) == 0) check_memory();
    plan_.pack_offsets.push_back(num_pieces());
    ++plan_.packs_by_size[static_cast<size_t>(pieces)];
  }

  void add_piece(int64_t document, int64_t begin) {
    if (begin > 0) {
      plan_.continued_piece.push_back(num_pieces());
      plan_.continued_begin.push_back(begin);
    }
    plan_.piece_document.push_back(static_cast<int32_t>(document));
  }

 protected:
  // Throws before the machine runs out of memory, which would end the process without a word.
  void check_memory() const {
    const auto numbers = 2 * plan_.continued_piece.size() + plan_.pack_offsets.size();
    if (static_cast<int64_t>(8 * numbers + 4 * plan_.piece_document.size()) > memory_limit()) {
      throw std::length_error("the plan takes more than a third of this machine's memory");
    }
  }

  const Documents& documents_;
  const PackingOptions& options_;
  Plan plan_;
  const int64_t bos_;
};

// The paper's rule: documents in order until the pack is full, the rest of the last one is
// discarded, the next pack starts with a new document.
class Truncate : public Builder {
 public:
  static constexpr int64_t kTaskSize = kChunk;
  using Result = Chunk;
  using Builder::Builder;

  Chunk make(const Walk& walk, const Task& task) const { return walk.read(task); }

  void consume(const Chunk& chunk) {
    const auto count = static_cast<int64_t>(chunk.document.size());
    const int64_t capacity = options_.capacity;
    const bool has_table = documents_.prefix_ids != nullptr;
    PlanCounts& c = plan_.counts;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t body = chunk.body[static_cast<size_t>(i)];
      if (body <= 1) {
        ++c.documents_empty;
        continue;
      }
      const int32_t known = chunk.prefix[static_cast<size_t>(i)];
      const int64_t prefix = std::max(known, 0);
      plan_.piece_document.push_back(static_cast<int32_t>(chunk.document[static_cast<size_t>(i)]));
      ++pieces_;
      ++c.documents;
      c.documents_plain += has_table && known < 0 ? 1 : 0;
      used_ += bos_ + prefix + body;
      c.body_tokens += body;
      c.prefix_tokens += prefix;
      c.bos_tokens += bos_;
      if (used_ >= capacity || pieces_ == options_.max_documents) {
        if (used_ > capacity) cut_overhang(body, prefix);
        close_pack(used_);
        used_ = pieces_ = 0;
        if (done()) return;
      }
    }
  }

  void finish() {
    if (pieces_ > 0 && !done()) close_pack(used_);
  }

 private:
  // Takes back what hangs over the end of the pack: body first, then prefix, then BOS.
  void cut_overhang(int64_t body, int64_t prefix) {
    const int64_t over = used_ - options_.capacity;
    const int64_t lost_body = std::min(over, body);
    const int64_t lost_prefix = std::min(over - lost_body, prefix);
    plan_.counts.body_tokens -= lost_body;
    plan_.counts.discarded_tokens += lost_body;
    plan_.counts.prefix_tokens -= lost_prefix;
    plan_.counts.bos_tokens -= over - lost_body - lost_prefix;
    plan_.counts.documents_cut += lost_body > 0 ? 1 : 0;
    used_ = options_.capacity;
  }

  int64_t used_ = 0;    // tokens in the open pack
  int64_t pieces_ = 0;  // documents in the open pack
};

// Documents in order; the rest of a cut one opens the next pack, under its own BOS and prefix.
class Split : public Builder {
 public:
  static constexpr int64_t kTaskSize = kChunk;
  using Result = Chunk;
  using Builder::Builder;

  Chunk make(const Walk& walk, const Task& task) const { return walk.read(task); }

  void consume(const Chunk& chunk) {
    for (size_t i = 0; i < chunk.document.size() && !done(); ++i) {
      if (chunk.body[i] <= 1) {
        ++plan_.counts.documents_empty;
      } else {
        place(chunk.document[i], chunk.body[i], chunk.prefix[i]);
      }
    }
  }

  void finish() {
    if (pieces_ > 0 && !done()) close();
  }

 private:
  void place(int64_t document, int64_t body, int32_t known_prefix) {
    PlanCounts& c = plan_.counts;
    int64_t begin = 0;
    bool cut = false;
    while (begin < body && !done()) {
      const int64_t prefix = begin == 0 || options_.repeat_prefix ? std::max(known_prefix, 0) : 0;
      const int64_t room = options_.capacity - used_ - bos_ - prefix;
      int64_t taken = std::min(body - begin, room);
      if (taken > 0 && taken < body - begin) {
        taken = documents_.cut(document, begin, taken, used_ == 0);
      }
      if (taken <= 0) {  // not one token of the body fits here
        close();
        continue;
      }
      add_piece(document, begin);
      ++pieces_;
      used_ += bos_ + prefix + taken;
      c.bos_tokens += bos_;
      c.prefix_tokens += prefix;
      c.body_tokens += taken;
      begin += taken;
      if (begin < body) cut = true;
      if (begin < body || used_ == options_.capacity || pieces_ == options_.max_documents) close();
    }
    if (begin == 0) return;  // the run ends before the document
    ++c.documents;
    c.documents_plain += documents_.prefix_ids != nullptr && known_prefix < 0 ? 1 : 0;
    c.documents_cut += cut ? 1 : 0;
    c.discarded_tokens += body - begin;  // the run ends inside the document
  }

  void close() {
    close_pack(used_);
    used_ = pieces_ = 0;
  }

  int64_t used_ = 0;
  int64_t pieces_ = 0;
};

// Best-fit's work on one window. Pieces are numbered in the order of their documents; `order` lists
// them in the order of the shuffled packs. The memory is used again for the next window: fresh
// pages would cost a fifth of the time.
struct Window {
  Chunk chunk;
  std::vector<int32_t> document;  // of each piece
  std::vector<int32_t> prefix;    // tokens shown, -1: the document is plain
  std::vector<int32_t> size;      // tokens in the pack: BOS, prefix, body
  std::vector<int64_t> begin;     // in the body
  std::vector<uint8_t> is_cut;    // whether more of the document follows
  std::vector<int32_t> count_of_size;
  std::vector<int32_t> next_rank;  // by size
  std::vector<int32_t> rank;       // of each piece, by falling size
  std::vector<int32_t> pack_of;    // by rank
  std::vector<int64_t> place;      // of each pack among the shuffled ones
  std::vector<int32_t> next;       // of each pack: where in `order` its next piece goes
  std::vector<int32_t> order;      // piece numbers
  // The result, in the order of the shuffled packs.
  std::vector<int32_t> pack_sizes;  // in pieces
  std::vector<int32_t> piece_document;
  std::vector<int32_t> continued_piece;
  std::vector<int64_t> continued_begin;
  PlanCounts counts;
};

// Best-fit-decreasing without search: packs with equal room are interchangeable, so a run of equal
// sizes goes into a run of equal packs at once. The sizes come sorted by counting.
//
// Pieces are small when a pack of them alone holds as many as are allowed before it is full. They
// come last, and packs that are opened for them stay half empty. So packs with little room are set
// aside until their rooms together are as large as the small pieces, and are filled when a piece
// fits no other and as many packs are open as all pieces need at least.
class BestFitDecreasing {
 public:
  BestFitDecreasing(int64_t capacity, int64_t max_pieces)
      : capacity_(capacity),
        max_pieces_(max_pieces),
        groups_(static_cast<size_t>(capacity) + 1),
        used_rooms_(static_cast<size_t>(capacity / 64) + 1) {}

  // pack_of[i]: the pack of the i-th largest piece. Returns the number of packs.
  int64_t place(const std::vector<int32_t>& count_of_size, std::vector<int32_t>* pack_of) {
    pack_of_ = pack_of->data();
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
  struct Group {  // packs [first, first + count), all with the same room and number of pieces
    int32_t first;
    int32_t count;
    int32_t pieces;
  };

  void place_run(int64_t size, int64_t left) {
    while (left > 0) {
      int64_t room = smallest_room(size);
      Group group;
      if (room < 0) {
        if (holds_back_ && num_packs_ == fewest_packs_) {
          holds_back_ = false;
          for (const auto& [aside_room, aside] : set_aside_) put(aside_room, aside);
          continue;
        }
        room = capacity_;
        group = open_packs(size, left);
      } else {
        group = pop(room);
      }
      const int64_t each = std::min(room / size, max_pieces_ - group.pieces);
      const auto whole = static_cast<int32_t>(std::min<int64_t>(group.count, left / each));
      assign(group.first, whole, each);
      push(room - each * size, {group.first, whole, group.pieces + static_cast<int32_t>(each)});
      left -= whole * each;
      group = {group.first + whole, group.count - whole, group.pieces};
      if (group.count > 0 && left > 0 && left < each) {
        assign(group.first, 1, left);
        push(room - left * size, {group.first, 1, group.pieces + static_cast<int32_t>(left)});
        left = 0;
        group = {group.first + 1, group.count - 1, group.pieces};
      }
      if (group.count > 0) put(room, group);
    }
  }

  // As many packs as a run of pieces needs, but only up to the fewest while some are held back.
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
      for (int64_t i = 0; i < each; ++i) *pack_of_++ = pack;
    }
  }

  // Packs that have just been given pieces.
  void push(int64_t room, Group group) {
    if (group.count == 0 || room == 0 || group.pieces >= max_pieces_) return;
    if (holds_back_ && room_wanted_ > 0 && room <= capacity_ / 4) {
      const int64_t wanted = (room_wanted_ + room - 1) / room;
      const auto count = static_cast<int32_t>(std::min<int64_t>(group.count, wanted));
      set_aside_.emplace_back(room, Group{group.first, count, group.pieces});
      room_wanted_ -= count * room;
      group = {group.first + count, group.count - count, group.pieces};
      if (group.count == 0) return;
    }
    put(room, group);
  }

  void put(int64_t room, Group group) {
    groups_[static_cast<size_t>(room)].push_back(group);
    used_rooms_[static_cast<size_t>(room / 64)] |= uint64_t{1} << (room % 64);
  }

  Group pop(int64_t room) {
    std::vector<Group>& stack = groups_[static_cast<size_t>(room)];
    const Group group = stack.back();
    stack.pop_back();
    if (stack.empty()) {
      used_rooms_[static_cast<size_t>(room / 64)] &= ~(uint64_t{1} << (room % 64));
    }
    return group;
  }

  int64_t smallest_room(int64_t size) const {
    auto word = static_cast<size_t>(size / 64);
    uint64_t bits = used_rooms_[word] & (~uint64_t{0} << (size % 64));
    while (bits == 0) {
      if (++word == used_rooms_.size()) return -1;
      bits = used_rooms_[word];
    }
    return static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits);
  }

  int64_t capacity_;
  int64_t max_pieces_;
  std::vector<std::vector<Group>> groups_;            // by room
  std::vector<uint64_t> used_rooms_;                  // bit r: groups_[r] is not empty
  std::vector<std::pair<int64_t, Group>> set_aside_;  // with the room of each pack
  int64_t room_wanted_ = 0;   // tokens that are still to be set aside for small pieces
  int64_t fewest_packs_ = 0;  // that could hold all pieces
  bool holds_back_ = false;   // whether set_aside_ is not to be filled yet
  int64_t num_packs_ = 0;
  int32_t* pack_of_ = nullptr;
};

// Documents longer than a pack are split; all pieces of a window are placed best-fit-decreasing and
// its packs shuffled. Nothing is discarded, and no document that fits a pack is cut.
class BestFit : public Builder {
 public:
  static constexpr int64_t kTaskSize = kWindow;
  using Result = std::unique_ptr<Window>;

  BestFit(const Documents& documents, const PackingOptions& options, int64_t expected_pieces,
          uint64_t seed)
      : Builder(documents, options, expected_pieces), seed_(seed) {}

  Result make(const Walk& walk, const Task& task) const {
    Result window = take_spare();
    walk.read(task, &window->chunk);
    cut_documents(window.get());
    sort_by_size(window.get());
    BestFitDecreasing packer(options_.capacity, options_.max_documents);
    window->pack_of.resize(window->size.size());
    const int64_t num_packs = packer.place(window->count_of_size, &window->pack_of);
    const uint64_t stream =
        hash_pair(static_cast<uint64_t>(task.epoch), static_cast<uint64_t>(task.begin) + 1);
    shuffle_packs(num_packs, stream, window.get());
    list_pieces(window.get());
    return window;
  }

  void consume(Result window) {
    check_memory();
    plan_.counts.documents_empty += window->counts.documents_empty;
    const auto packs = static_cast<int64_t>(window->pack_sizes.size());
    if (options_.num_packs < 0 || num_packs() + packs <= options_.num_packs) {
      append_all(*window);
    } else {
      append_some(*window);
    }
    const std::lock_guard<std::mutex> lock(spare_mutex_);
    spare_.push_back(std::move(window));
  }

  void finish() {}

 private:
  Result take_spare() const {
    const std::lock_guard<std::mutex> lock(spare_mutex_);
    if (spare_.empty()) return std::make_unique<Window>();
    Result window = std::move(spare_.back());
    spare_.pop_back();
    return window;
  }

  void cut_documents(Window* w) const {
    const Chunk& chunk = w->chunk;
    for (auto* array : {&w->document, &w->prefix, &w->size}) array->clear();
    w->begin.clear();
    w->is_cut.clear();
    w->count_of_size.assign(static_cast<size_t>(options_.capacity) + 1, 0);
    w->counts = {};
    PlanCounts& c = w->counts;
    const bool has_table = documents_.prefix_ids != nullptr;
    auto add = [&](size_t i, int64_t begin, int64_t taken, int32_t prefix, bool is_cut) {
      const int64_t size = bos_ + std::max(prefix, 0) + taken;
      if (w->size.size() == kMaxWindowPieces) {
        throw std::length_error("too many pieces: the documents are far longer than a pack");
      }
      w->document.push_back(static_cast<int32_t>(chunk.document[i]));
      w->prefix.push_back(prefix);
      w->size.push_back(static_cast<int32_t>(size));
      w->begin.push_back(begin);
      w->is_cut.push_back(is_cut ? 1 : 0);
      ++w->count_of_size[static_cast<size_t>(size)];
      c.prefix_tokens += std::max(prefix, 0);
    };
    for (size_t i = 0; i < chunk.document.size(); ++i) {
      const int64_t body = chunk.body[i];
      if (body <= 1) {
        ++c.documents_empty;
        continue;
      }
      const int32_t known = chunk.prefix[i];
      ++c.documents;
      c.documents_plain += has_table && known < 0 ? 1 : 0;
      c.body_tokens += body;
      const int64_t room = options_.capacity - bos_ - std::max(known, 0);
      if (body <= room) {
        add(i, 0, body, known, false);
        continue;
      }
      ++c.documents_cut;
      for (int64_t begin = 0; begin < body;) {
        const bool shown = begin == 0 || options_.repeat_prefix;
        const int32_t prefix = shown ? known : std::min(known, 0);
        const int64_t left = options_.capacity - bos_ - std::max(prefix, 0);
        int64_t taken = std::min(body - begin, left);
        if (taken < body - begin) taken = documents_.cut(chunk.document[i], begin, taken, true);
        add(i, begin, taken, prefix, begin + taken < body);
        begin += taken;
      }
    }
    c.bos_tokens = bos_ * static_cast<int64_t>(w->size.size());
  }

  // Ranks by falling size, documents of equal size in their order: a counting sort.
  void sort_by_size(Window* w) const {
    w->next_rank.resize(w->count_of_size.size());
    int32_t total = 0;
    for (size_t size = w->count_of_size.size(); size-- > 0;) {
      w->next_rank[size] = total;
      total += w->count_of_size[size];
    }
    w->rank.resize(w->size.size());
    for (size_t i = 0; i < w->size.size(); ++i) {
      w->rank[i] = w->next_rank[static_cast<size_t>(w->size[i])]++;
    }
  }

  void shuffle_packs(int64_t num_packs, uint64_t stream, Window* w) const {
    const auto packs = static_cast<size_t>(num_packs);
    w->place.resize(packs);
    if (packs > 0) Permutation(packs, seed_, stream).fill(0, num_packs, w->place.data());
    // First the pieces of each pack, then where its first piece goes.
    w->next.assign(packs, 0);
    for (const int32_t pack : w->pack_of) ++w->next[static_cast<size_t>(pack)];
    w->pack_sizes.resize(packs);
    for (size_t p = 0; p < packs; ++p) {
      w->pack_sizes[static_cast<size_t>(w->place[p])] = w->next[p];
    }
    std::vector<int32_t>& first = w->next_rank;  // done with
    first.resize(packs);
    int32_t total = 0;
    for (size_t p = 0; p < packs; ++p) {
      first[p] = total;
      total += w->pack_sizes[p];
    }
    for (size_t p = 0; p < packs; ++p) w->next[p] = first[static_cast<size_t>(w->place[p])];
    w->order.resize(w->size.size());
    for (size_t i = 0; i < w->size.size(); ++i) {
      const int32_t pack = w->pack_of[static_cast<size_t>(w->rank[i])];
      // The lowest bit spares the look at `begin`, which is large and rarely needed.
      w->order[static_cast<size_t>(w->next[static_cast<size_t>(pack)]++)] =
          static_cast<int32_t>(i) * 2 + (w->begin[i] > 0 ? 1 : 0);
    }
  }

  void list_pieces(Window* w) const {
    w->piece_document.resize(w->order.size());
    w->continued_piece.clear();
    w->continued_begin.clear();
    for (size_t k = 0; k < w->order.size(); ++k) {
      const auto i = static_cast<size_t>(w->order[k] >> 1);
      w->piece_document[k] = w->document[i];
      if ((w->order[k] & 1) != 0) {
        w->continued_piece.push_back(static_cast<int32_t>(k));
        w->continued_begin.push_back(w->begin[i]);
      }
    }
    const PlanCounts& c = w->counts;
    w->counts.padding_tokens = options_.capacity * static_cast<int64_t>(w->pack_sizes.size()) -
                               c.body_tokens - c.prefix_tokens - c.bos_tokens;
  }

  void append_all(const Window& w) {
    const int64_t base = num_pieces();
    plan_.piece_document.insert(plan_.piece_document.end(), w.piece_document.begin(),
                                w.piece_document.end());
    for (const int32_t piece : w.continued_piece) plan_.continued_piece.push_back(base + piece);
    plan_.continued_begin.insert(plan_.continued_begin.end(), w.continued_begin.begin(),
                                 w.continued_begin.end());
    int64_t offset = base;
    for (const int32_t pieces : w.pack_sizes) {
      plan_.pack_offsets.push_back(offset += pieces);
      ++plan_.packs_by_size[static_cast<size_t>(pieces)];
    }
    PlanCounts& c = plan_.counts;
    c.documents += w.counts.documents;
    c.documents_cut += w.counts.documents_cut;
    c.documents_plain += w.counts.documents_plain;
    c.body_tokens += w.counts.body_tokens;
    c.prefix_tokens += w.counts.prefix_tokens;
    c.bos_tokens += w.counts.bos_tokens;
    c.padding_tokens += w.counts.padding_tokens;
  }

  // The last window of a plan with a given number of packs.
  void append_some(const Window& w) {
    PlanCounts& c = plan_.counts;
    const bool has_table = documents_.prefix_ids != nullptr;
    size_t next = 0;
    for (const int32_t pieces : w.pack_sizes) {
      if (done()) return;
      int64_t used = 0;
      for (const size_t end = next + static_cast<size_t>(pieces); next < end; ++next) {
        const auto i = static_cast<size_t>(w.order[next] >> 1);
        const int64_t prefix = std::max(w.prefix[i], 0);
        add_piece(w.document[i], w.begin[i]);
        used += w.size[i];
        c.body_tokens += w.size[i] - bos_ - prefix;
        c.prefix_tokens += prefix;
        c.bos_tokens += bos_;
        if (w.begin[i] == 0) {
          ++c.documents;
          c.documents_cut += w.is_cut[i];
          c.documents_plain += has_table && w.prefix[i] < 0 ? 1 : 0;
        }
      }
      close_pack(used);
    }
  }

  uint64_t seed_;
  mutable std::mutex spare_mutex_;
  mutable std::vector<Result> spare_;
};

void check(const Documents& documents, const Order& order, const PackingOptions& options) {
  auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  require(options.capacity >= 2 && options.capacity <= kMaxCapacity,
          "capacity must be 2 to 67,108,864");
  require(options.max_documents >= 1, "max_documents must be at least 1");
  require(options.num_threads >= 1, "num_threads must be at least 1");
  require(options.num_packs >= -1, "num_packs must not be negative");
  require(documents.num_documents >= 0 && documents.num_documents <= INT32_MAX,
          "documents are numbered with 31 bits");
  // Without sums, which could overflow.
  require(order.first_document >= 0 && order.num_documents >= 0 &&
              order.first_document <= documents.num_documents &&
              order.num_documents <= documents.num_documents - order.first_document &&
              order.range_begin >= 0 && order.range_begin <= order.range_end &&
              order.range_end <= order.num_documents,
          "document range out of bounds");
  if (options.num_packs > memory_limit() / 8) {
    throw std::length_error("the plan takes more than a third of this machine's memory");
  }
  if (options.strategy == Strategy::kTruncate || documents.prefix_ids == nullptr) return;
  for (int64_t p = 0; p < documents.num_prefixes; ++p) {
    const int64_t head =
        documents.prefix_length(static_cast<int32_t>(p)) + (documents.has_bos ? 1 : 0);
    require(head < options.capacity, "a prefix leaves no room for its document");
  }
}

// Makes results on several threads and consumes them in order, so that nothing depends on who was
// first. Results that turn out not to be needed are thrown away.
template <typename Packer>
Plan run(Packer&& packer, const Walk& walk, const PackingOptions& options) {
  const int64_t size = walk.size();
  if (size == 0 || options.num_packs == 0) return std::move(packer.plan());
  const bool one_epoch = options.num_packs < 0;

  Task upcoming{0, 0, 0};
  auto next_task = [&]() -> std::optional<Task> {
    if (upcoming.end == size) {
      if (one_epoch) return std::nullopt;
      upcoming = {upcoming.epoch + 1, 0, 0};
    }
    upcoming = {upcoming.epoch, upcoming.end, std::min(size, upcoming.end + Packer::kTaskSize)};
    return upcoming;
  };

  std::deque<std::pair<Task, std::future<typename Packer::Result>>> in_flight;
  auto start_next = [&] {
    if (const auto task = next_task()) {
      const auto policy = options.num_threads > 1 ? std::launch::async : std::launch::deferred;
      in_flight.emplace_back(
          *task, std::async(policy, [&packer, &walk, t = *task] { return packer.make(walk, t); }));
    }
  };

  for (int i = 0; i < std::min(options.num_threads, kMaxThreads); ++i) start_next();
  auto last_told = std::chrono::steady_clock::now();
  int64_t pieces_before_epoch = 0;
  while (!in_flight.empty()) {
    auto [task, future] = std::move(in_flight.front());
    in_flight.pop_front();
    auto result = future.get();
    start_next();
    packer.consume(std::move(result));
    packer.counts().num_epochs = task.epoch + 1;
    if (packer.done()) break;
    if (task.end == size) {
      // An epoch of empty documents: no number of further ones helps.
      if (packer.num_pieces() == pieces_before_epoch) break;
      pieces_before_epoch = packer.num_pieces();
    }
    const auto now = std::chrono::steady_clock::now();
    if (options.progress && now - last_told > std::chrono::milliseconds(100)) {
      last_told = now;
      const double done = one_epoch ? static_cast<double>(task.end) / static_cast<double>(size)
                                    : static_cast<double>(packer.num_packs()) /
                                          static_cast<double>(options.num_packs);
      options.progress(done);
    }
  }
  packer.finish();
  return std::move(packer.plan());
}

}  // namespace

uint64_t hash_pair(uint64_t a, uint64_t b) { return mix(mix(a + kGolden) + (b + 1) * kGolden); }

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t stream) : size_(size) {
  bits_ = 1;
  while (bits_ < 64 && (uint64_t{1} << bits_) < size) ++bits_;
  mask_ = bits_ == 64 ? ~uint64_t{0} : (uint64_t{1} << bits_) - 1;
  shift_ = (bits_ + 1) / 2;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t key = hash_pair(hash_pair(seed, stream), static_cast<uint64_t>(round));
    add_[round] = key & mask_;
    multiply_[round] = (mix(key) | 1) & mask_;
  }
}

uint64_t Permutation::round_trip(uint64_t x) const {
  for (int round = 0; round < kRounds; ++round) {
    x = (x + add_[round]) & mask_;
    x = (x * multiply_[round]) & mask_;
    x ^= x >> shift_;
  }
  return x;
}

uint64_t Permutation::operator()(uint64_t index) const {
  uint64_t x = round_trip(index);
  while (x >= size_) x = round_trip(x);
  return x;
}

void Permutation::fill(uint64_t begin, int64_t count, int64_t* values) const {
  if (bits_ > 32) {
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<int64_t>((*this)(begin + static_cast<uint64_t>(i)));
    }
    return;
  }
  constexpr int64_t kBlock = 1024;
  uint32_t x[kBlock];
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = std::min(kBlock, count - done);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = static_cast<uint32_t>(begin + static_cast<uint64_t>(done + i));
    }
    permute_block(x, n, static_cast<uint32_t>(mask_), shift_, add_, multiply_, kRounds);
    // Those outside walk on: gather them, permute them again, until none is left.
    int32_t outside[kBlock];
    uint32_t again[kBlock];
    int64_t num_outside = 0;
    for (int32_t i = 0; i < n; ++i) {
      values[done + i] = x[i];
      outside[num_outside] = i;
      num_outside += x[i] >= size_ ? 1 : 0;
    }
    while (num_outside > 0) {
      for (int64_t i = 0; i < num_outside; ++i) again[i] = x[outside[i]];
      permute_block(again, num_outside, static_cast<uint32_t>(mask_), shift_, add_, multiply_,
                    kRounds);
      int64_t left = 0;
      for (int64_t i = 0; i < num_outside; ++i) {
        const int32_t at = outside[i];
        x[at] = again[i];
        values[done + at] = again[i];
        outside[left] = at;
        left += again[i] >= size_ ? 1 : 0;
      }
      num_outside = left;
    }
  }
}

std::pair<int64_t, int64_t> Documents::sequences_of(int64_t document) const {
  if (document_indices == nullptr) return {document, document + 1};
  const int64_t begin = load(document_indices, document);
  const int64_t end = load(document_indices, document + 1);
  if (begin < 0 || begin > end || end > num_sequences) {
    throw std::out_of_range("damaged index: sequences of a document");
  }
  return {begin, end};
}

int64_t Documents::body_length(int64_t document) const {
  const auto [begin, end] = sequences_of(document);
  int64_t length = 0;
  int64_t all = 0;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t one = load(sequence_lengths, s);
    length += one;
    all |= one;
  }
  if (all < 0) throw std::out_of_range("damaged index: a length below zero");
  return length;
}

int32_t Documents::prefix_id(int64_t document) const {
  if (prefix_ids == nullptr) return -1;
  const int32_t id = load(prefix_ids, document);
  if (id < -1 || id >= num_prefixes) throw std::out_of_range("prefix number out of range");
  if (plain_threshold != 0 &&
      hash_pair(plain_seed, static_cast<uint64_t>(document)) < plain_threshold) {
    return -1;
  }
  return id;
}

int64_t Documents::prefix_begin(int32_t prefix_id) const {
  const int64_t begin = load(prefix_offsets, prefix_id);
  const int64_t end = load(prefix_offsets, int64_t{prefix_id} + 1);
  if (begin < 0 || begin > end || end > num_prefix_tokens || end - begin > INT32_MAX) {
    throw std::out_of_range("damaged prefix table: offsets");
  }
  return begin;
}

int64_t Documents::prefix_length(int32_t prefix_id) const {
  if (prefix_id < 0) return 0;
  return load(prefix_offsets, int64_t{prefix_id} + 1) - prefix_begin(prefix_id);
}

int64_t Documents::cut(int64_t document, int64_t begin, int64_t room, bool must) const {
  if (document_indices == nullptr) return room;  // one sequence: there is no better place
  int64_t border = 0;
  int64_t best = 0;
  const auto [first, last] = sequences_of(document);
  for (int64_t s = first; s < last; ++s) {
    border += load(sequence_lengths, s);
    if (border > begin + room) break;
    best = border;
  }
  if (best > begin) return best - begin;
  return must ? room : 0;
}

int64_t check(const Documents& documents) {
  auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  if (documents.document_indices != nullptr) {
    int64_t last = 0;
    for (int64_t i = 0; i <= documents.num_documents; ++i) {
      const int64_t index = load(documents.document_indices, i);
      require(index >= last && index <= documents.num_sequences,
              "document_indices must rise and stay within the sequences");
      last = index;
    }
  }
  if (documents.prefix_offsets == nullptr) return 0;
  int64_t longest = 0;
  int64_t last = 0;
  for (int64_t i = 0; i <= documents.num_prefixes; ++i) {
    const int64_t offset = load(documents.prefix_offsets, i);
    require(offset >= last && offset <= documents.num_prefix_tokens,
            "prefix_offsets must rise and stay within prefix_tokens");
    if (i > 0) longest = std::max(longest, offset - last);
    last = offset;
  }
  require(longest <= INT32_MAX, "a prefix is longer than 2^31 - 1 tokens");
  require(documents.num_prefixes <= INT32_MAX, "prefixes are numbered with 31 bits");
  return longest;
}

Strategy parse_strategy(const std::string& name) {
  if (name == "truncate") return Strategy::kTruncate;
  if (name == "split") return Strategy::kSplit;
  if (name == "best-fit") return Strategy::kBestFit;
  throw std::invalid_argument("unknown packing strategy: " + name);
}

Plan build_plan(const Documents& documents, const Order& order, const PackingOptions& given) {
  check(documents, order, given);
  PackingOptions options = given;
  // A piece holds a token, so no pack can have more of them.
  options.max_documents = std::min(options.max_documents, options.capacity);
  const Walk walk(documents, order);
  // A guess at the pieces of a plan; an epoch's are known to within its splits.
  const int64_t expected = options.num_packs == 0 ? 0 : walk.size();
  switch (options.strategy) {
    case Strategy::kTruncate:
      return run(Truncate(documents, options, expected), walk, options);
    case Strategy::kSplit:
      return run(Split(documents, options, expected), walk, options);
    case Strategy::kBestFit:
      return run(BestFit(documents, options, expected, order.seed), walk, options);
  }
  throw std::invalid_argument("unknown packing strategy");
}

}  // namespace meco
