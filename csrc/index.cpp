#include "index.h"

#include <algorithm>
#include <future>
#include <stdexcept>
#include <vector>

#include "packing.h"

namespace meco {

namespace {

constexpr int64_t kBlock = int64_t{1} << 14;
constexpr int64_t kMinShare = int64_t{1} << 18;  // numbers that are worth a thread
constexpr int kMaxThreads = 256;

// Where sequence `i + 1` begins by the length of sequence `i`. Numbers of a damaged index may be
// any, so sums wrap around.
uint64_t end_of(const IndexArrays& index, int64_t i) {
  return static_cast<uint64_t>(load(index.pointers, i)) +
         static_cast<uint64_t>(load(index.lengths, i)) * static_cast<uint64_t>(index.token_bytes);
}

bool begins_wrong(const IndexArrays& index, int64_t i) {
  const auto begin = static_cast<uint64_t>(load(index.pointers, i));
  return begin != (i == 0 ? 0 : end_of(index, i - 1));
}

// Sequences [begin, end).
IndexScan scan_sequences(const IndexArrays& index, int64_t begin, int64_t end) {
  IndexScan scan;
  uint64_t tokens = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(end, block + kBlock);
    // The usual case without a branch for each number; what is wrong is looked for afterwards.
    uint64_t wrong = begins_wrong(index, block) ? 1 : 0;
    int32_t negative = load(index.lengths, block);
    tokens += static_cast<uint64_t>(negative);
    for (int64_t i = block + 1; i < stop; ++i) {
      const int32_t length = load(index.lengths, i);
      negative |= length;
      tokens += static_cast<uint64_t>(length);
      wrong |= end_of(index, i - 1) ^ static_cast<uint64_t>(load(index.pointers, i));
    }
    for (int64_t i = block; i < stop && negative < 0 && scan.bad_length < 0; ++i) {
      if (load(index.lengths, i) < 0) scan.bad_length = i;
    }
    for (int64_t i = block; i < stop && wrong != 0 && scan.bad_pointer < 0; ++i) {
      if (begins_wrong(index, i)) scan.bad_pointer = i;
    }
  }
  scan.num_tokens = static_cast<int64_t>(tokens);
  return scan;
}

// Entries [begin, end) of the documents' bounds.
IndexScan scan_bounds(const IndexArrays& index, int64_t begin, int64_t end) {
  IndexScan scan;
  scan.one_sequence_each = true;
  int64_t before = begin == 0 ? 0 : load(index.first_sequences, begin - 1);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t bound = load(index.first_sequences, i);
    const bool is_edge_wrong =
        (i == 0 && bound != 0) || (i == index.num_bounds - 1 && bound != index.num_sequences);
    if ((bound < before || bound > index.num_sequences || is_edge_wrong) && scan.bad_bound < 0) {
      scan.bad_bound = i;
    }
    scan.one_sequence_each &= bound == i;
    before = bound;
  }
  return scan;
}

void keep_lowest(int64_t place, int64_t* lowest) {
  if (place >= 0 && (*lowest < 0 || place < *lowest)) *lowest = place;
}

template <typename Scan>
void scan_all(Scan scan, const IndexArrays& index, int64_t count, int num_threads,
              std::vector<IndexScan>* parts) {
  const int64_t shares = std::clamp<int64_t>(count / kMinShare, 1, num_threads);
  std::vector<std::future<IndexScan>> running;
  for (int64_t share = 1; share < shares; ++share) {
    const int64_t begin = count / shares * share;
    const int64_t end = share + 1 == shares ? count : begin + count / shares;
    running.push_back(std::async(std::launch::async,
                                 [&index, scan, begin, end] { return scan(index, begin, end); }));
  }
  parts->push_back(scan(index, 0, shares == 1 ? count : count / shares));
  for (auto& part : running) parts->push_back(part.get());
}

}  // namespace

IndexScan scan_index(const IndexArrays& index, int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  if (index.token_bytes < 1 || index.token_bytes > 8) {
    throw std::invalid_argument("tokens must be 1 to 8 bytes wide");
  }
  if (index.num_bounds < 1) throw std::invalid_argument("there must be one bound at least");
  num_threads = std::min(num_threads, kMaxThreads);
  std::vector<IndexScan> sequences;
  std::vector<IndexScan> bounds;
  if (index.num_sequences > 0) {
    scan_all(scan_sequences, index, index.num_sequences, num_threads, &sequences);
  }
  scan_all(scan_bounds, index, index.num_bounds, num_threads, &bounds);
  IndexScan total;
  for (const IndexScan& part : sequences) {
    total.num_tokens += part.num_tokens;
    keep_lowest(part.bad_length, &total.bad_length);
    keep_lowest(part.bad_pointer, &total.bad_pointer);
  }
  total.one_sequence_each = index.num_bounds - 1 == index.num_sequences;
  for (const IndexScan& part : bounds) {
    keep_lowest(part.bad_bound, &total.bad_bound);
    total.one_sequence_each &= part.one_sequence_each;
  }
  return total;
}

}  // namespace meco
