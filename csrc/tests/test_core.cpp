// C++ tests of packing and assembly, without Python: meant for the sanitizers (`make sanitize`).
//
// Random corpora are packed and assembled; a second, plain walk over the pieces checks the arrays.
// What is right is decided by tests/reference.py; here the point is that no access goes astray.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../assemble.h"
#include "../distinct.h"
#include "../index.h"
#include "../packing.h"
#include "../url.h"

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

struct TestTexts {
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> tokens;

  meco::TextTable view() const {
    meco::TextTable table;
    table.ids = ids.data();
    table.offsets = offsets.data();
    table.num_texts = static_cast<int64_t>(offsets.size()) - 1;
    table.tokens = tokens.data();
    table.num_tokens = static_cast<int64_t>(tokens.size());
    return table;
  }
};

struct TestCorpus {
  std::vector<int32_t> lengths;
  std::vector<int64_t> indices;
  TestTexts prefixes;
  TestTexts suffixes;
  std::vector<uint16_t> bin;
  std::vector<int64_t> pointers;  // in tokens, one for each sequence

  meco::Documents view(bool bos) const {
    meco::Documents documents;
    documents.num_documents = static_cast<int64_t>(indices.size()) - 1;
    documents.sequence_lengths = lengths.data();
    documents.num_sequences = static_cast<int64_t>(lengths.size());
    documents.document_indices = indices.data();
    documents.prefixes = prefixes.view();
    documents.suffixes = suffixes.view();
    documents.has_bos = bos;
    return documents;
  }
};

TestCorpus make_corpus(std::mt19937_64& draw, int num_documents) {
  TestCorpus corpus;
  auto below = [&](int n) { return static_cast<int>(draw() % static_cast<uint64_t>(n)); };
  for (TestTexts* texts : {&corpus.prefixes, &corpus.suffixes}) {
    for (int p = 0; p < 3; ++p) {
      for (int t = below(4); t >= 0; --t) texts->tokens.push_back(60000 + p);
      texts->offsets.push_back(static_cast<int64_t>(texts->tokens.size()));
    }
    texts->tokens.shrink_to_fit();
  }
  corpus.indices.push_back(0);
  for (int d = 0; d < num_documents; ++d) {
    for (int s = below(3); s >= 0; --s) {
      const int length = below(20) == 0 ? below(500) : below(12);
      corpus.lengths.push_back(length);
      corpus.pointers.push_back(static_cast<int64_t>(corpus.bin.size()));
      for (int t = 0; t < length; ++t) corpus.bin.push_back(static_cast<uint16_t>(below(50000)));
    }
    corpus.indices.push_back(static_cast<int64_t>(corpus.lengths.size()));
    corpus.prefixes.ids.push_back(below(4) - 1);
    corpus.suffixes.ids.push_back(below(4) - 1);
  }
  corpus.bin.shrink_to_fit();  // a look behind the end is a look outside
  return corpus;
}

meco::PlanView view_of(const meco::Plan& plan) {
  meco::PlanView view;
  view.pack_offsets = plan.pack_offsets.data();
  view.num_packs = static_cast<int64_t>(plan.pack_offsets.size()) - 1;
  view.piece_document = plan.piece_document.data();
  view.num_pieces = static_cast<int64_t>(plan.piece_document.size());
  view.continued_piece = plan.continued_piece.data();
  view.continued_begin = plan.continued_begin.data();
  view.num_continued = static_cast<int64_t>(plan.continued_piece.size());
  return view;
}

void check_pack(const TestCorpus& corpus, const meco::Documents& documents,
                const meco::PlanView& view, int64_t pack, const meco::AssemblyOptions& options) {
  const auto pieces = meco::pieces_of_pack(view, documents, pack, options);
  std::vector<const uint8_t*> sources;
  for (const auto& piece : pieces) {
    const int64_t first = corpus.indices[static_cast<size_t>(piece.document)];
    sources.push_back(reinterpret_cast<const uint8_t*>(
        corpus.bin.data() + corpus.pointers[static_cast<size_t>(first)] + piece.body_begin));
  }
  // Buffers of exactly the promised sizes: one element too far is a sanitizer's report.
  const auto length = static_cast<size_t>(options.capacity);
  std::vector<int64_t> tokens(length + 1, -7), positions(length, -7);
  std::vector<float> mask(length, -7.0f);
  std::vector<int32_t> bounds(static_cast<size_t>(meco::num_cu_seqlens(options)), -7);
  int32_t max_seqlen = -7;
  int64_t prefix_tokens = -7;
  meco::SampleArrays out{tokens.data(), mask.data(), positions.data(),
                         bounds.data(), &max_seqlen, &prefix_tokens};
  meco::assemble(pieces, sources, 2, documents, options, &out);

  CHECK(bounds.front() == 0 && bounds.back() == options.capacity);
  CHECK(std::is_sorted(bounds.begin(), bounds.end()));
  CHECK(std::find(tokens.begin(), tokens.end(), -7) == tokens.end());
  CHECK(tokens.back() == options.pad_id);
  int64_t trained = 0, bodies = 0;
  for (float m : mask) {
    CHECK(m == 0.0f || m == 1.0f);
    trained += m == 1.0f ? 1 : 0;
  }
  for (const auto& piece : pieces) {
    const int64_t body = piece.body_end - piece.body_begin;
    const int64_t eod = piece.suffix.tokens > 0 && piece.body_end == piece.body ? 1 : 0;
    const bool head = piece.has_bos || piece.prefix.tokens > 0;
    int64_t labels = body - eod + (options.train_on_suffix ? piece.suffix.tokens : 0);
    // The first token of a segment is no label.
    if (!head && (options.train_on_suffix || body > eod)) labels = std::max<int64_t>(labels - 1, 0);
    bodies += labels + eod;
  }
  CHECK(trained == bodies);
  for (int32_t bound : bounds) CHECK(bound % options.alignment == 0);

  std::vector<float> compared(length, -7.0f);
  meco::compared_of_pack(view, documents, pack, options, compared.data());
  for (size_t t = 0; t < length; ++t) {
    CHECK(compared[t] == 0.0f || (compared[t] == 1.0f && mask[t] == 1.0f));
  }
}

void test_random_corpora() {
  std::mt19937_64 draw(11);
  for (int round = 0; round < 300; ++round) {
    const int num_documents = 1 + static_cast<int>(draw() % 60);
    const TestCorpus corpus = make_corpus(draw, num_documents);
    const meco::Documents documents = corpus.view(round % 2 == 0);
    const int64_t alignment = round % 2 == 0 ? 1 : 1 + static_cast<int64_t>(draw() % 9);
    const int64_t capacity = (11 + static_cast<int64_t>(draw() % 60)) * alignment;
    const int64_t cap = round % 4 == 0 ? 2 : capacity;
    meco::Order order{0, num_documents, 0, num_documents, draw()};
    meco::PackingOptions packing;
    packing.strategy = static_cast<meco::Strategy>(round % 3);
    packing.capacity = capacity;
    packing.num_packs = round % 5 == 0 ? -1 : 30;
    packing.max_documents = cap;
    packing.repeat_prefix = round % 7 != 0;
    packing.repeat_every = round % 4 == 1 ? 1 + static_cast<int64_t>(draw() % 9) : 0;
    packing.alignment = alignment;
    packing.num_threads = 1 + round % 2;
    const meco::Plan plan = meco::build_plan(documents, order, packing);
    const meco::PlanView view = view_of(plan);
    const meco::PlanCounts& counts = plan.counts;
    CHECK(counts.body_tokens + counts.prefix_tokens + counts.suffix_tokens + counts.bos_tokens +
              counts.padding_tokens ==
          view.num_packs * capacity);
    meco::AssemblyOptions options;
    options.strategy = packing.strategy;
    options.repeat_prefix = packing.repeat_prefix;
    options.repeat_every = packing.repeat_every;
    options.alignment = alignment;
    options.capacity = capacity;
    options.max_documents = cap;
    options.bos_id = 0;
    options.pad_id = 1;
    options.train_on_suffix = round % 3 != 0;
    for (int64_t pack = 0; pack < view.num_packs; ++pack) {
      for (meco::View shown :
           {meco::View::kConditioned, meco::View::kPlain, meco::View::kShuffled}) {
        options.view = shown;
        check_pack(corpus, documents, view, pack, options);
      }
    }
  }
}

template <typename Call>
void expect_throw(Call call) {
  try {
    call();
  } catch (const std::exception&) {
    return;
  }
  CHECK(!"an exception was expected");
}

void test_damaged_plans_are_refused() {
  std::mt19937_64 draw(5);
  const TestCorpus corpus = make_corpus(draw, 10);
  const meco::Documents documents = corpus.view(true);
  meco::AssemblyOptions options;
  options.capacity = 16;
  options.max_documents = 4;
  const int64_t offsets[] = {0, 2};
  const int64_t backwards[] = {0, -1};
  const int64_t beyond[] = {0, 3};
  const int32_t good[] = {1, 2};
  const int32_t bad[] = {1, 10};
  meco::PlanView view;
  view.num_packs = 1;
  view.num_pieces = 2;
  view.piece_document = good;
  for (const int64_t* wrong : {backwards, beyond}) {
    view.pack_offsets = wrong;
    expect_throw([&] { meco::pieces_of_pack(view, documents, 0, options); });
  }
  view.pack_offsets = offsets;
  view.piece_document = bad;
  expect_throw([&] { meco::pieces_of_pack(view, documents, 0, options); });
  expect_throw([&] { meco::pieces_of_pack(view, documents, 1, options); });
  expect_throw([&] { meco::pieces_of_pack(view, documents, -1, options); });
}

// Any numbers at all in a plan: pieces inside the corpus, or an exception; never a look outside.
void test_hostile_plans() {
  std::mt19937_64 draw(9);
  const int64_t odd[] = {INT64_MIN, -1, 0, 1, 2, 7, 40, INT32_MAX, INT64_MAX};
  int refused = 0, accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    const int num_documents = 20;
    const TestCorpus corpus = make_corpus(draw, num_documents);
    const meco::Documents documents = corpus.view(true);
    meco::PackingOptions packing;
    packing.strategy = static_cast<meco::Strategy>(round % 3);
    packing.capacity = 32;
    packing.max_documents = 32;
    meco::Plan plan = meco::build_plan(documents, {0, num_documents, 0, num_documents, 1}, packing);
    auto spoil = [&](auto& values) {
      for (auto& value : values) {
        using Value = std::decay_t<decltype(value)>;
        if (draw() % 30 == 0) value = static_cast<Value>(odd[draw() % 9]);
      }
    };
    spoil(plan.pack_offsets);
    spoil(plan.piece_document);
    spoil(plan.continued_piece);
    spoil(plan.continued_begin);
    const meco::PlanView view = view_of(plan);
    meco::AssemblyOptions options;
    options.strategy = packing.strategy;
    options.capacity = packing.capacity;
    options.max_documents = packing.max_documents;
    for (int64_t pack = 0; pack < view.num_packs; ++pack) {
      try {
        check_pack(corpus, documents, view, pack, options);
        ++accepted;
      } catch (const std::out_of_range&) {
        ++refused;
      }
    }
  }
  CHECK(refused > 1000 && accepted > 1000);
}

// Numbers that callers and files may hold, whatever is allowed.
const int64_t kOdd[] = {INT64_MIN,
                        INT64_MIN + 1,
                        INT32_MIN,
                        -2,
                        -1,
                        0,
                        1,
                        2,
                        3,
                        17,
                        64,
                        1000,
                        INT32_MAX,
                        int64_t{1} << 32,
                        INT64_MAX / 8,
                        int64_t{1} << 62,
                        INT64_MAX - 1,
                        INT64_MAX};
constexpr size_t kNumOdd = sizeof(kOdd) / sizeof(kOdd[0]);

// Copies of arrays that begin at an odd byte, as those of Megatron's index do, in memory of their
// own that ends where they end.
class Misaligned {
 public:
  template <typename T>
  const T* operator()(const std::vector<T>& values) {
    copies_.emplace_back(values.size() * sizeof(T) + 2);
    if (!values.empty()) {
      std::memcpy(copies_.back().data() + 2, values.data(), values.size() * sizeof(T));
    }
    return reinterpret_cast<const T*>(copies_.back().data() + 2);
  }

 private:
  std::vector<std::vector<char>> copies_;
};

// Any arrays and any options: a result or an exception, never a look outside or an overflow.
void test_hostile_calls() {
  std::mt19937_64 draw(21);
  int refused = 0, planned = 0, assembled = 0;
  auto odd = [&] { return kOdd[draw() % kNumOdd]; };
  auto maybe_odd = [&](int64_t value) { return draw() % 8 == 0 ? odd() : value; };
  for (int round = 0; round < 20000; ++round) {
    const int num_documents = 1 + static_cast<int>(draw() % 20);
    TestCorpus corpus = make_corpus(draw, num_documents);
    auto spoil = [&](auto& values) {
      using Value = std::decay_t<decltype(values[0])>;
      // No lengths of 2^31: a pack of two tokens would make a plan of gigabytes of them.
      const int64_t most = sizeof(Value) == 4 ? 20000 : INT64_MAX;
      if (draw() % 3 != 0) return;
      for (auto& value : values) {
        if (draw() % 20 == 0) value = static_cast<Value>(std::min(odd(), most));
      }
    };
    spoil(corpus.lengths);
    spoil(corpus.indices);
    for (TestTexts* texts : {&corpus.prefixes, &corpus.suffixes}) {
      spoil(texts->ids);
      spoil(texts->offsets);
    }
    spoil(corpus.pointers);
    for (auto& pointer : corpus.pointers) {
      pointer = static_cast<int64_t>(static_cast<uint64_t>(pointer) * 2);  // in bytes
    }
    meco::Documents documents = corpus.view(round % 2 == 0);
    Misaligned misaligned;
    documents.sequence_lengths = misaligned(corpus.lengths);
    if (round % 3 == 0) {  // one sequence each
      documents.document_indices = nullptr;
      documents.num_documents = documents.num_sequences;
      corpus.prefixes.ids.resize(corpus.lengths.size(), -1);
      corpus.suffixes.ids.resize(corpus.lengths.size(), -1);
    } else {
      documents.document_indices = misaligned(corpus.indices);
    }
    documents.prefixes.ids = round % 5 == 0 ? nullptr : misaligned(corpus.prefixes.ids);
    documents.prefixes.offsets = misaligned(corpus.prefixes.offsets);
    documents.suffixes.ids = round % 3 == 0 ? nullptr : misaligned(corpus.suffixes.ids);
    documents.suffixes.offsets = misaligned(corpus.suffixes.offsets);
    meco::Order order{maybe_odd(0), maybe_odd(documents.num_documents), maybe_odd(0),
                      maybe_odd(documents.num_documents), draw()};
    meco::PackingOptions packing;
    packing.strategy = static_cast<meco::Strategy>(draw() % 3);
    packing.capacity = maybe_odd(32);
    packing.num_packs = maybe_odd(round % 2 == 0 ? -1 : 20);
    packing.max_documents = maybe_odd(8);
    packing.repeat_prefix = draw() % 2 == 0;
    packing.repeat_every = draw() % 2 == 0 ? 0 : maybe_odd(3);
    packing.alignment = draw() % 2 == 0 ? 1 : maybe_odd(8);
    packing.num_threads = static_cast<int>(draw() % 50 == 0 ? odd() : 1);
    // As many packs as there is memory for take their time; refusing them is seen with others.
    if (packing.num_packs > 1000 && packing.num_packs <= int64_t{1} << 32) packing.num_packs = 1000;
    meco::Plan plan;
    try {
      // Half of them as after a check that is no longer true: maps can change under a reader.
      if (round % 2 == 0) {
        meco::check(documents);
        meco::check(documents.prefixes);
        meco::check(documents.suffixes);
      }
      plan = meco::build_plan(documents, order, packing);
      ++planned;
    } catch (const std::exception&) {
      ++refused;
      plan.pack_offsets = {0, 1, 3};
      plan.piece_document = {0, 0, 1};
    }
    auto spoil_plan = [&](auto& values) {
      for (auto& value : values) {
        if (draw() % 40 == 0) value = static_cast<std::decay_t<decltype(value)>>(odd());
      }
    };
    spoil_plan(plan.pack_offsets);
    spoil_plan(plan.piece_document);
    spoil_plan(plan.continued_piece);
    spoil_plan(plan.continued_begin);
    meco::AssemblyOptions given;
    given.strategy = static_cast<meco::Strategy>(draw() % 3);
    given.repeat_prefix = packing.repeat_prefix;
    given.repeat_every = draw() % 2 == 0 ? packing.repeat_every : maybe_odd(2);
    given.alignment = draw() % 2 == 0 ? packing.alignment : maybe_odd(4);
    given.capacity = maybe_odd(32);
    given.max_documents = maybe_odd(8);
    given.vocab_size = maybe_odd(70000);
    given.view = static_cast<meco::View>(draw() % 3);
    const meco::PlanView view = view_of(plan);
    try {
      const meco::AssemblyOptions options = meco::check(given);
      if (options.capacity > 1000) continue;
      const int64_t packs[] = {0, view.num_packs - 1, odd()};
      for (const int64_t pack : packs) {
        const auto pieces = meco::pieces_of_pack(view, documents, pack, options);
        const meco::TokenFile file{reinterpret_cast<const uint8_t*>(corpus.bin.data()),
                                   static_cast<int64_t>(corpus.bin.size() * 2),
                                   misaligned(corpus.pointers),
                                   static_cast<int64_t>(corpus.pointers.size()), 2};
        std::vector<const uint8_t*> sources;
        for (const auto& piece : pieces) sources.push_back(meco::locate(file, documents, piece));
        const auto length = static_cast<size_t>(options.capacity);
        std::vector<int64_t> tokens(length + 1), positions(length);
        std::vector<float> mask(length);
        std::vector<int32_t> bounds(static_cast<size_t>(meco::num_cu_seqlens(options)));
        int32_t max_seqlen;
        int64_t prefix_tokens;
        meco::SampleArrays out{tokens.data(), mask.data(), positions.data(),
                               bounds.data(), &max_seqlen, &prefix_tokens};
        meco::assemble(pieces, sources, 2, documents, options, &out);
        meco::compared_of_pack(view, documents, pack, options, mask.data());
        ++assembled;
      }
    } catch (const std::exception&) {
      ++refused;
    }
  }
  CHECK(refused > 5000 && planned > 2000 && assembled > 2000);
}

// The number of each fault is the lowest, whatever the threads; random damage is found.
void test_scans() {
  std::mt19937_64 draw(4);
  const int64_t count = 1'000'000;
  std::vector<int32_t> lengths;
  std::vector<int64_t> pointers, bounds;
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    lengths.push_back(static_cast<int32_t>(draw() % 1000));
    pointers.push_back(end);
    bounds.push_back(i);
    end += lengths.back() * 4;
  }
  bounds.push_back(count);
  auto scan = [&](int threads) {
    Misaligned misaligned;
    return meco::scan_index({misaligned(lengths), misaligned(pointers), count, misaligned(bounds),
                             static_cast<int64_t>(bounds.size()), 4},
                            threads);
  };
  const meco::IndexScan whole = scan(3);
  CHECK(whole.num_tokens == end / 4 && whole.one_sequence_each);
  CHECK(whole.bad_length < 0 && whole.bad_pointer < 0 && whole.bad_bound < 0);
  for (int round = 0; round < 60; ++round) {
    const auto place = static_cast<size_t>(round < 6 ? (round % 2 == 0 ? 0 : count - 1)
                                                     : static_cast<int64_t>(draw() % count));
    const int64_t value = kOdd[draw() % kNumOdd];
    const int threads = 1 + round % 4;
    if (round % 3 == 0) {
      const int32_t before = lengths[place];
      lengths[place] = static_cast<int32_t>(value);
      const auto length = lengths[place];
      const meco::IndexScan damaged = scan(threads);
      CHECK(damaged.bad_length == (length < 0 ? static_cast<int64_t>(place) : -1));
      const bool is_last = static_cast<int64_t>(place) == count - 1;
      CHECK(length == before || is_last || damaged.bad_pointer == static_cast<int64_t>(place) + 1);
      lengths[place] = before;
    } else if (round % 3 == 1) {
      const int64_t before = pointers[place];
      pointers[place] = value;
      CHECK(value == before || scan(threads).bad_pointer == static_cast<int64_t>(place));
      pointers[place] = before;
    } else {
      const int64_t before = bounds[place];
      bounds[place] = value;
      const meco::IndexScan damaged = scan(threads);
      CHECK(value == before || !damaged.one_sequence_each);
      const bool in_order = value >= (place == 0 ? 0 : bounds[place - 1]) &&
                            value <= bounds[place + 1] && (place > 0 || value == 0);
      CHECK(in_order == (damaged.bad_bound < 0));
      bounds[place] = before;
    }
  }
  std::vector<int64_t> none{0};
  const meco::IndexScan empty = meco::scan_index({nullptr, nullptr, 0, none.data(), 1, 2}, 2);
  CHECK(empty.num_tokens == 0 && empty.bad_bound < 0 && empty.one_sequence_each);
  expect_throw([&] { meco::scan_index({nullptr, nullptr, 0, none.data(), 0, 2}, 2); });
  expect_throw([&] { meco::scan_index({nullptr, nullptr, 0, none.data(), 1, 0}, 2); });
  expect_throw([&] { meco::scan_index({nullptr, nullptr, 0, none.data(), 1, 2}, 0); });
}

// Sizes and seeds of any kind give values inside the range.
void test_hostile_permutations() {
  for (const int64_t size : kOdd) {
    for (const int64_t seed : kOdd) {
      const auto wide = static_cast<uint64_t>(size);
      const meco::Permutation order(wide, static_cast<uint64_t>(seed), 1);
      if (wide == 0) continue;
      int64_t values[3];
      order.fill(wide / 2, 1, values);
      CHECK(static_cast<uint64_t>(values[0]) < wide);
    }
  }
}

// The same texts get the same numbers, in the order in which they come, whatever the batches are.
void test_distinct_texts() {
  std::mt19937 random(7);
  std::vector<std::string> texts;
  for (int i = 0; i < 30000; ++i) {
    texts.push_back(std::string(random() % 40, 'x') + std::to_string(random() % 9000));
  }
  std::map<std::string, int32_t> numbers;
  meco::DistinctTexts distinct;
  for (size_t begin = 0; begin < texts.size();) {
    const size_t end = std::min(texts.size(), begin + 1 + random() % 500);
    // Each batch lies in memory of just its size.
    std::string data;
    std::vector<int32_t> offsets{0};
    std::vector<uint8_t> valid;
    for (size_t i = begin; i < end; ++i) {
      data += texts[i];
      offsets.push_back(static_cast<int32_t>(data.size()));
      valid.push_back(random() % 10 != 0);
    }
    const std::vector<uint8_t> bytes(data.begin(), data.end());
    std::vector<int32_t> ids(end - begin);
    std::vector<int64_t> first_rows;
    distinct.number(bytes.data(), offsets.data(), valid.data(), static_cast<int64_t>(end - begin),
                    ids.data(), &first_rows);
    size_t num_first = 0;
    for (size_t i = begin; i < end; ++i) {
      if (!valid[i - begin]) {
        CHECK(ids[i - begin] == -1);
        continue;
      }
      const auto added = numbers.emplace(texts[i], static_cast<int32_t>(numbers.size()));
      CHECK(ids[i - begin] == added.first->second);
      if (added.second) CHECK(first_rows[num_first++] == static_cast<int64_t>(i - begin));
    }
    CHECK(num_first == first_rows.size());
    CHECK(distinct.size() == static_cast<int64_t>(numbers.size()));
    begin = end;
  }
}

// Whatever the bytes are, nothing outside of them is touched, and copies are parts of what is
// there.
void test_plain_urls() {
  std::mt19937 random(11);
  const char alphabet[] = "hHttps:://..--aZ9@ \n\x7f\xff/?#";
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    std::vector<int32_t> offsets{0};
    for (int i = 0; i < 5; ++i) {
      if (random() % 2) text += random() % 2 ? "http://" : "https://";
      for (size_t n = random() % 12; n > 0; --n)
        text += alphabet[random() % (sizeof(alphabet) - 1)];
      offsets.push_back(static_cast<int32_t>(text.size()));
    }
    const std::vector<uint8_t> data(text.begin(), text.end());
    for (const bool hosts_only : {false, true}) {
      std::vector<uint8_t> copies(data.size()), is_plain(5);
      std::vector<int32_t> borders(6);
      meco::copy_plain_urls(data.data(), offsets.data(), 5, hosts_only, copies.data(),
                            borders.data(), is_plain.data());
      CHECK(borders[0] == 0);
      for (int i = 0; i < 5; ++i) CHECK((borders[i + 1] > borders[i]) == (is_plain[i] != 0));
    }
  }
}

}  // namespace

int main() {
  test_random_corpora();
  test_damaged_plans_are_refused();
  test_hostile_plans();
  test_hostile_calls();
  test_scans();
  test_hostile_permutations();
  test_distinct_texts();
  test_plain_urls();
  std::puts("C++ tests passed");
  return 0;
}
