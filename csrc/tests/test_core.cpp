// C++ tests of packing and assembly, without Python: meant for the sanitizers (`make sanitize`).
//
// Random corpora are packed and assembled; a second, plain walk over the pieces checks the arrays.
// What is right is decided by tests/reference.py; here the point is that no access goes astray.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "../assemble.h"
#include "../packing.h"

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

struct TestCorpus {
  std::vector<int32_t> lengths;
  std::vector<int64_t> indices;
  std::vector<int32_t> prefix_ids;
  std::vector<int64_t> prefix_offsets{0};
  std::vector<int32_t> prefix_tokens;
  std::vector<uint16_t> bin;
  std::vector<int64_t> pointers;  // in tokens, one for each sequence

  meco::Documents view(bool bos) const {
    meco::Documents documents;
    documents.num_documents = static_cast<int64_t>(indices.size()) - 1;
    documents.sequence_lengths = lengths.data();
    documents.document_indices = indices.data();
    documents.prefix_ids = prefix_ids.data();
    documents.prefix_offsets = prefix_offsets.data();
    documents.num_prefixes = static_cast<int64_t>(prefix_offsets.size()) - 1;
    documents.has_bos = bos;
    return documents;
  }
};

TestCorpus make_corpus(std::mt19937_64& draw, int num_documents) {
  TestCorpus corpus;
  auto below = [&](int n) { return static_cast<int>(draw() % static_cast<uint64_t>(n)); };
  for (int p = 0; p < 3; ++p) {
    for (int t = below(7); t >= 0; --t) corpus.prefix_tokens.push_back(60000 + p);
    corpus.prefix_offsets.push_back(static_cast<int64_t>(corpus.prefix_tokens.size()));
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
    corpus.prefix_ids.push_back(below(4) - 1);
  }
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
  meco::assemble(pieces, sources, 2, documents, corpus.prefix_tokens.data(), options, &out);

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
    const bool head = piece.has_bos || piece.prefix_tokens > 0;
    bodies += head ? body : std::max<int64_t>(body - 1, 0);
  }
  CHECK(trained == bodies);
}

void test_random_corpora() {
  std::mt19937_64 draw(11);
  for (int round = 0; round < 300; ++round) {
    const int num_documents = 1 + static_cast<int>(draw() % 60);
    const TestCorpus corpus = make_corpus(draw, num_documents);
    const meco::Documents documents = corpus.view(round % 2 == 0);
    const int64_t capacity = 10 + static_cast<int64_t>(draw() % 60);
    const int64_t cap = round % 4 == 0 ? 2 : capacity;
    meco::Order order{0, num_documents, 0, num_documents, draw()};
    meco::PackingOptions packing;
    packing.strategy = static_cast<meco::Strategy>(round % 3);
    packing.capacity = capacity;
    packing.num_packs = round % 5 == 0 ? -1 : 30;
    packing.max_documents = cap;
    packing.repeat_prefix = round % 7 != 0;
    packing.num_threads = 1 + round % 2;
    const meco::Plan plan = meco::build_plan(documents, order, packing);
    const meco::PlanView view = view_of(plan);
    const meco::PlanCounts& counts = plan.counts;
    CHECK(counts.body_tokens + counts.prefix_tokens + counts.bos_tokens + counts.padding_tokens ==
          view.num_packs * capacity);
    meco::AssemblyOptions options;
    options.strategy = packing.strategy;
    options.repeat_prefix = packing.repeat_prefix;
    options.capacity = capacity;
    options.max_documents = cap;
    options.bos_id = 0;
    options.pad_id = 1;
    for (int64_t pack = 0; pack < view.num_packs; ++pack) {
      for (bool hide : {false, true}) {
        options.hide_prefixes = hide;
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

}  // namespace

int main() {
  test_random_corpora();
  test_damaged_plans_are_refused();
  test_hostile_plans();
  std::puts("C++ tests passed");
  return 0;
}
