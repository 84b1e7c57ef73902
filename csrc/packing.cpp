#include "packing.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <future>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "best_fit.h"

namespace meco {

namespace {

// Documents that one thread reads at a time: few enough for a cache, enough to start a thread for.
constexpr int64_t kChunk = int64_t{1} << 16;
constexpr int kMaxThreads = 256;  // more than any plan can keep busy

// Bytes that a plan may take: a third of this machine's memory, because a growing vector holds its
// old and its new memory at once.
int64_t memory_limit() {
  static const int64_t limit = int64_t{sysconf(_SC_PHYS_PAGES)} / 3 * sysconf(_SC_PAGESIZE);
  return limit;
}

// A plan, and the pack that is being filled.
class Builder {
 public:
  Builder(const Documents& documents, const PackingOptions& options, int64_t expected_pieces)
      : documents_(documents),
        options_(options),
        layout_(documents, options),
        has_table_(documents.has_metadata()),
        room_(options.capacity) {
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

 protected:
  // Adds a piece that begins at `begin` of its document to the open pack.
  void add_piece(const DocumentSize& document, int64_t begin, const PieceSize& piece) {
    PlanCounts& c = plan_.counts;
    if (begin > 0) {
      plan_.continued_piece.push_back(num_pieces());
      plan_.continued_begin.push_back(begin);
    } else {
      ++c.documents;
      c.documents_cut += piece.body < document.body ? 1 : 0;
      c.documents_plain += has_table_ && document.is_plain() ? 1 : 0;
    }
    plan_.piece_document.push_back(static_cast<int32_t>(document.number));
    c.body_tokens += piece.body;
    c.prefix_tokens += piece.prefix + piece.repeated;
    c.suffix_tokens += piece.suffix;
    c.bos_tokens += piece.bos;
    c.padding_tokens += piece.padding;
    c.alignment_tokens += piece.padding;
    room_ -= piece.total();
    ++pieces_;
  }

  void close_pack() {
    plan_.counts.padding_tokens += room_;
    // Now and then is enough: in between a plan grows by little.
    if (plan_.pack_offsets.size() % (size_t{1} << 16) == 0) check_memory();
    plan_.pack_offsets.push_back(num_pieces());
    ++plan_.packs_by_size[static_cast<size_t>(pieces_)];
    room_ = options_.capacity;
    pieces_ = 0;
  }

  // Throws before the machine runs out of memory: the kernel would kill the process silently.
  void check_memory() const {
    const auto numbers = 2 * plan_.continued_piece.size() + plan_.pack_offsets.size();
    if (static_cast<int64_t>(8 * numbers + 4 * plan_.piece_document.size()) > memory_limit()) {
      throw std::length_error("the plan takes more than a third of this machine's memory");
    }
  }

  const Documents& documents_;
  const PackingOptions& options_;
  const Layout layout_;
  const bool has_table_;
  Plan plan_;
  int64_t room_;        // tokens left in the open pack
  int64_t pieces_ = 0;  // in the open pack
};

// `truncate` and `split`: documents in order fill pack after pack. The rest of a document that does
// not fit is dropped by `truncate` (the paper's rule) and opens the next pack with `split`.
// Without `kExtras` no document has a suffix and no prefix is repeated within a piece.
template <Strategy kStrategy, bool kExtras>
class InOrder : public Builder {
 public:
  static constexpr int64_t kTaskSize = kChunk;
  using Result = Chunk;
  using Builder::Builder;

  Chunk make(const Walk& walk, const Task& task) const {
    Chunk chunk;
    walk.read(task, &chunk);
    return chunk;
  }

  void consume(const Chunk& chunk) {
    for (size_t i = 0; i < chunk.size() && !done(); ++i) {
      const DocumentSize document = chunk[i];
      if (document.body <= 1) {
        ++plan_.counts.documents_empty;
      } else {
        place(document);
      }
    }
  }

  void finish() {
    if (pieces_ > 0 && !done()) close_pack();
  }

 private:
  static constexpr bool kDropsRest = kStrategy == Strategy::kTruncate;

  void place(const DocumentSize& document) {
    int64_t begin = 0;
    do {
      const PieceSize piece = layout_.fit_as<kStrategy, kExtras>(document, begin, room_);
      if (!kDropsRest && piece.body <= 0) {  // not one token of the body fits here
        if (pieces_ == 0) throw std::out_of_range("damaged prefix table: no room for a body");
        close_pack();
        continue;
      }
      add_piece(document, begin, piece);
      begin += piece.body;
      if (begin < document.body || room_ == 0 || pieces_ == options_.max_documents) close_pack();
    } while (!kDropsRest && begin < document.body && !done());
    // Where a plan ends before the first piece of a document, nothing of it is in the plan.
    if (kDropsRest || begin > 0) plan_.counts.discarded_tokens += document.body - begin;
  }
};

// `best-fit`, see best_fit.h. Nothing is discarded, and no document that fits a pack is cut.
class BestFit : public Builder {
 public:
  static constexpr int64_t kTaskSize = kWindow;
  using Result = std::unique_ptr<Window>;

  BestFit(const Documents& documents, const PackingOptions& options, int64_t expected_pieces,
          uint64_t seed)
      : Builder(documents, options, expected_pieces), packer_(documents, options, seed) {}

  Result make(const Walk& walk, const Task& task) const { return packer_.pack(walk, task); }

  void consume(Result window) {
    check_memory();
    plan_.counts.documents_empty += window->documents_empty;
    if (options_.num_packs < 0 || num_packs() + window->num_packs() <= options_.num_packs) {
      append_all(*window);
    } else {
      append_some(*window);
    }
    packer_.recycle(std::move(window));
  }

  void finish() {}

 private:
  void append_all(const Window& w) {
    const int64_t base = num_pieces();
    plan_.piece_document.insert(plan_.piece_document.end(), w.piece_document.begin(),
                                w.piece_document.end());
    for (const int32_t piece : w.continued) {
      plan_.continued_piece.push_back(base + piece);
      plan_.continued_begin.push_back(w.piece_begin[static_cast<size_t>(piece)]);
    }
    for (size_t p = 1; p < w.pack_offsets.size(); ++p) {
      plan_.pack_offsets.push_back(base + w.pack_offsets[p]);
      ++plan_.packs_by_size[static_cast<size_t>(w.pack_offsets[p] - w.pack_offsets[p - 1])];
    }
    PlanCounts& c = plan_.counts;
    c.documents += w.documents;
    c.documents_cut += w.documents_cut;
    c.documents_plain += w.documents_plain;
    c.body_tokens += w.tokens.body;
    c.prefix_tokens += w.tokens.prefix + w.tokens.repeated;
    c.suffix_tokens += w.tokens.suffix;
    c.bos_tokens += w.tokens.bos;
    c.padding_tokens += options_.capacity * w.num_packs() - w.tokens.total() + w.tokens.padding;
    c.alignment_tokens += w.tokens.padding;
  }

  // The first packs of the last window, when a plan has a given number of packs.
  void append_some(const Window& w) {
    for (size_t p = 1; p < w.pack_offsets.size() && !done(); ++p) {
      for (int32_t k = w.pack_offsets[p - 1]; k < w.pack_offsets[p]; ++k) {
        const auto piece = static_cast<size_t>(k);
        const DocumentSize document = documents_.size_of(w.piece_document[piece]);
        const int64_t begin = w.piece_begin[piece];
        add_piece(document, begin, layout_.fit(document, begin, room_));
      }
      close_pack();
    }
  }

  WindowPacker packer_;
};

void check(const Documents& documents, const Order& order, const PackingOptions& options) {
  auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
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
  const Layout layout(documents, options);
  if (layout.drops_rest() || documents.prefixes.ids == nullptr) return;
  for (int64_t p = 0; p < documents.prefixes.num_texts; ++p) {
    const int64_t prefix = documents.prefixes.length(static_cast<int32_t>(p));
    require(layout.head(prefix) < options.capacity, "a prefix leaves no room for its document");
  }
}

// Makes results on several threads and consumes them in order, so that the plan does not depend on
// which is finished first. Results that turn out not to be needed are thrown away.
template <typename Packer>
Plan run(Packer&& packer, const Walk& walk, const PackingOptions& options) {
  const int64_t size = walk.epoch_size();
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
  auto last_progress = std::chrono::steady_clock::now();
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
      // All documents of this epoch were empty: further epochs would not help.
      if (packer.num_pieces() == pieces_before_epoch) break;
      pieces_before_epoch = packer.num_pieces();
    }
    const auto now = std::chrono::steady_clock::now();
    if (options.progress && now - last_progress > std::chrono::milliseconds(100)) {
      last_progress = now;
      const double share = one_epoch ? static_cast<double>(task.end) / static_cast<double>(size)
                                     : static_cast<double>(packer.num_packs()) /
                                           static_cast<double>(options.num_packs);
      options.progress(share);
    }
  }
  packer.finish();
  return std::move(packer.plan());
}

template <Strategy kStrategy>
Plan run_in_order(const Documents& documents, const PackingOptions& options,
                  int64_t expected_pieces, const Walk& walk) {
  if (Layout::has_extras(documents, options)) {
    return run(InOrder<kStrategy, true>(documents, options, expected_pieces), walk, options);
  }
  return run(InOrder<kStrategy, false>(documents, options, expected_pieces), walk, options);
}

}  // namespace

Plan build_plan(const Documents& documents, const Order& order, const PackingOptions& given) {
  PackingOptions options = given;
  check(&options);
  check(documents, order, options);
  const Walk walk(documents, order);
  // A guess: in one epoch every document is a piece, and cut ones are a few more.
  const int64_t expected_pieces = options.num_packs == 0 ? 0 : walk.epoch_size();
  if (options.strategy == Strategy::kBestFit) {
    return run(BestFit(documents, options, expected_pieces, order.seed), walk, options);
  }
  if (options.strategy == Strategy::kSplit) {
    return run_in_order<Strategy::kSplit>(documents, options, expected_pieces, walk);
  }
  return run_in_order<Strategy::kTruncate>(documents, options, expected_pieces, walk);
}

}  // namespace meco
