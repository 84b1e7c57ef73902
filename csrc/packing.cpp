#include "packing.h"

#include <algorithm>
#include <stdexcept>

namespace meco {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Everything a strategy needs to visit documents in order, epoch after epoch.
class Visitor {
 public:
  Visitor(const Order& order)
      : order_(order),
        size_(order.range_end - order.range_begin),
        split_(order.num_documents, order.seed, 0),
        epoch_(size_, order.seed, 0) {}

  // The next document; starts the next epoch when the last one is used up.
  int64_t next() {
    if (position_ == size_) {
      position_ = 0;
      ++epochs_;
      epoch_ = Permutation(size_, order_.seed, static_cast<uint64_t>(epochs_));
    }
    // The first epoch walks the split's own permutation, which is random already.
    const int64_t within =
        epochs_ == 0 ? position_ : static_cast<int64_t>(epoch_(static_cast<uint64_t>(position_)));
    ++position_;
    return order_.first_document +
           static_cast<int64_t>(split_(static_cast<uint64_t>(order_.range_begin + within)));
  }

  bool epoch_done() const { return position_ == size_; }
  int64_t epochs_begun() const { return epochs_ + 1; }

 private:
  Order order_;
  int64_t size_;
  Permutation split_;
  Permutation epoch_;
  int64_t position_ = 0;
  int64_t epochs_ = 0;
};

void check(const Documents& documents, const Order& order, const PackingOptions& options) {
  if (options.capacity < 2) throw std::invalid_argument("capacity must be at least 2");
  if (options.max_documents < 1) throw std::invalid_argument("max_documents must be at least 1");
  if (order.first_document < 0 || order.num_documents < 0 ||
      order.first_document + order.num_documents > documents.num_documents ||
      order.range_begin < 0 || order.range_begin > order.range_end ||
      order.range_end > order.num_documents) {
    throw std::invalid_argument("document range out of bounds");
  }
}

// The paper's rule: documents in order until the pack is full, the rest of the last one is
// discarded, the next pack starts with a new document.
Plan pack_truncate(const Documents& documents, const Order& order, const PackingOptions& options) {
  Plan plan;
  plan.pack_offsets.push_back(0);
  if (options.num_packs == 0 || order.range_begin == order.range_end) return plan;

  Visitor visitor(order);
  const bool one_epoch = options.num_packs < 0;
  const int64_t bos = documents.has_bos ? 1 : 0;
  int64_t used = 0;    // tokens in the open pack
  int64_t pieces = 0;  // documents in the open pack
  bool placed_in_epoch = false;

  auto close_pack = [&] {
    plan.padding_tokens += options.capacity - used;
    plan.pack_offsets.push_back(static_cast<int64_t>(plan.piece_document.size()));
    used = pieces = 0;
  };
  auto done = [&] {
    return !one_epoch && static_cast<int64_t>(plan.pack_offsets.size()) > options.num_packs;
  };

  while (!done()) {
    if (visitor.epoch_done()) {
      if (!placed_in_epoch) break;  // every document is empty: no number of epochs helps
      if (one_epoch) break;
      placed_in_epoch = false;
    }
    const int64_t document = visitor.next();
    const int64_t body = documents.body_length(document);
    if (body <= 1) {
      ++plan.documents_empty;
      continue;
    }
    placed_in_epoch = true;
    const int32_t prefix_id = documents.prefix_id(document);
    const int64_t prefix = documents.prefix_length(prefix_id);
    const int64_t room = options.capacity - used;
    const int64_t taken = std::min(room, bos + prefix + body);
    const int64_t prefix_taken = std::min(std::max<int64_t>(taken - bos, 0), prefix);
    const int64_t body_taken = std::max<int64_t>(taken - bos - prefix, 0);

    plan.piece_document.push_back(static_cast<int32_t>(document));
    ++pieces;
    used += taken;
    ++plan.documents;
    plan.bos_tokens += std::min(bos, taken);
    plan.prefix_tokens += prefix_taken;
    plan.body_tokens += body_taken;
    plan.discarded_tokens += body - body_taken;
    plan.documents_cut += body_taken < body ? 1 : 0;
    plan.documents_plain += documents.prefix_ids != nullptr && prefix_id < 0 ? 1 : 0;
    if (used == options.capacity || pieces == options.max_documents) close_pack();
  }
  if (pieces > 0 && !done()) close_pack();
  plan.num_epochs = visitor.epochs_begun();
  return plan;
}

}  // namespace

uint64_t hash_pair(uint64_t a, uint64_t b) { return mix(mix(a + kGolden) + (b + 1) * kGolden); }

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t stream) : size_(size) {
  int bits = 1;
  while (bits < 64 && (uint64_t{1} << bits) < size) ++bits;
  mask_ = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  shift_ = (bits + 1) / 2;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t key = hash_pair(hash_pair(seed, stream), static_cast<uint64_t>(round));
    add_[round] = key & mask_;
    multiply_[round] = (mix(key) | 1) & mask_;
  }
}

uint64_t Permutation::operator()(uint64_t index) const {
  uint64_t x = index;
  do {
    for (int round = 0; round < kRounds; ++round) {
      x = (x + add_[round]) & mask_;
      x = (x * multiply_[round]) & mask_;
      x ^= x >> shift_;
    }
  } while (x >= size_);
  return x;
}

int64_t Documents::body_length(int64_t document) const {
  if (document_indices == nullptr) return sequence_lengths[document];
  int64_t length = 0;
  for (int64_t s = document_indices[document]; s < document_indices[document + 1]; ++s) {
    length += sequence_lengths[s];
  }
  return length;
}

int32_t Documents::prefix_id(int64_t document) const {
  if (prefix_ids == nullptr) return -1;
  const int32_t id = prefix_ids[document];
  if (id < -1 || id >= num_prefixes) throw std::out_of_range("prefix number out of range");
  if (plain_threshold != 0 &&
      hash_pair(plain_seed, static_cast<uint64_t>(document)) < plain_threshold) {
    return -1;
  }
  return id;
}

Plan build_plan(const Documents& documents, const Order& order, const PackingOptions& options) {
  check(documents, order, options);
  if (options.strategy == "truncate") return pack_truncate(documents, order, options);
  throw std::invalid_argument("unknown packing strategy: " + options.strategy);
}

}  // namespace meco
