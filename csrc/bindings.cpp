// Python bindings: check what comes in, keep it alive, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "assemble.h"
#include "distinct.h"
#include "index.h"
#include "packing.h"
#include "url.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: a wrong dtype is an error

template <typename T>
Array<T> to_array(std::vector<T>&& values) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule free_owner(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return Array<T>({static_cast<py::ssize_t>(owner->size())}, owner->data(), free_owner);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename T>
void require_1d(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must be 1-D");
}

// The texts before or behind documents, with whatever keeps the arrays alive.
class Texts {
 public:
  Texts(std::optional<Array<int32_t>> ids, Array<int32_t> tokens, Array<int64_t> offsets,
        int64_t num_documents)
      : ids_(std::move(ids)), tokens_(std::move(tokens)), offsets_(std::move(offsets)) {
    require_1d(tokens_, "tokens");
    require_1d(offsets_, "offsets");
    require(offsets_.size() >= 1, "offsets must not be empty");
    table_.offsets = offsets_.data();
    table_.num_texts = offsets_.size() - 1;
    table_.tokens = tokens_.data();
    table_.num_tokens = tokens_.size();
    if (ids_) {
      require_1d(*ids_, "ids");
      require(ids_->size() == num_documents, "ids must hold one number for each document");
      table_.ids = ids_->data();
    }
    longest_ = meco::check(table_);
  }

  const meco::TextTable& table() const { return table_; }
  int64_t longest() const { return longest_; }

 private:
  std::optional<Array<int32_t>> ids_;
  Array<int32_t> tokens_;
  Array<int64_t> offsets_;
  meco::TextTable table_;
  int64_t longest_ = 0;
};

// The documents of one corpus, with whatever keeps the arrays alive.
class Corpus {
 public:
  Corpus(Array<int32_t> sequence_lengths, std::optional<Array<int64_t>> document_indices,
         std::optional<Array<int32_t>> prefix_ids, Array<int32_t> prefix_tokens,
         Array<int64_t> prefix_offsets, std::optional<Array<int32_t>> suffix_ids,
         Array<int32_t> suffix_tokens, Array<int64_t> suffix_offsets, int64_t bos_id,
         uint64_t plain_seed, uint64_t plain_threshold)
      : sequence_lengths_(std::move(sequence_lengths)),
        document_indices_(std::move(document_indices)),
        prefixes_(std::move(prefix_ids), std::move(prefix_tokens), std::move(prefix_offsets),
                  num_documents()),
        suffixes_(std::move(suffix_ids), std::move(suffix_tokens), std::move(suffix_offsets),
                  num_documents()),
        bos_id_(bos_id) {
    documents_.num_documents = num_documents();
    documents_.sequence_lengths = sequence_lengths_.data();
    documents_.num_sequences = sequence_lengths_.size();
    if (document_indices_) documents_.document_indices = document_indices_->data();
    documents_.prefixes = prefixes_.table();
    documents_.suffixes = suffixes_.table();
    meco::check(documents_);
    documents_.has_bos = bos_id >= 0;
    documents_.plain_seed = plain_seed;
    documents_.plain_threshold = plain_threshold;
  }

  const meco::Documents& documents() const { return documents_; }
  int64_t bos_id() const { return bos_id_; }
  bool one_sequence_each() const { return documents_.document_indices == nullptr; }
  int64_t longest_head() const { return prefixes_.longest() + (documents_.has_bos ? 1 : 0); }

  // Tokens of BOS, prefix and suffix of the document with a suffix that has most of them; 0 if none
  // has a suffix. May be more if that is no more than `enough`: then not all documents are read.
  int64_t longest_metadata(int64_t enough) const {
    if (suffixes_.longest() == 0 || suffixes_.table().ids == nullptr) return 0;
    const int64_t bound = longest_head() + suffixes_.longest();
    if (bound <= enough) return bound;
    py::gil_scoped_release release;
    const int64_t longest = meco::longest_prefix_and_suffix(documents_);
    return longest == 0 ? 0 : longest + (documents_.has_bos ? 1 : 0);
  }

 private:
  int64_t num_documents() const {
    require_1d(sequence_lengths_, "sequence_lengths");
    if (!document_indices_) return sequence_lengths_.size();
    require_1d(*document_indices_, "document_indices");
    require(document_indices_->size() >= 1, "document_indices must not be empty");
    return document_indices_->size() - 1;
  }

  Array<int32_t> sequence_lengths_;
  std::optional<Array<int64_t>> document_indices_;
  Texts prefixes_;
  Texts suffixes_;
  int64_t bos_id_;
  meco::Documents documents_;
};

py::dict build_plan(const Corpus& corpus, const std::string& strategy, int64_t capacity,
                    int64_t max_documents, std::optional<int64_t> num_packs, int64_t first_document,
                    int64_t num_documents, int64_t range_begin, int64_t range_end, uint64_t seed,
                    bool repeat_prefix, int64_t repeat_every, int64_t alignment, int num_threads,
                    const py::object& progress) {
  meco::Order order{first_document, num_documents, range_begin, range_end, seed};
  meco::PackingOptions options;
  options.strategy = meco::parse_strategy(strategy);
  options.capacity = capacity;
  require(num_packs.value_or(0) >= 0, "num_packs must not be negative");
  options.num_packs = num_packs.value_or(-1);
  options.max_documents = max_documents;
  options.repeat_prefix = repeat_prefix;
  options.repeat_every = repeat_every;
  options.alignment = alignment;
  options.num_threads = num_threads;
  options.progress = [&progress](double share) {
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
    if (!progress.is_none()) progress(share);
  };
  meco::Plan plan;
  {
    py::gil_scoped_release release;
    plan = meco::build_plan(corpus.documents(), order, options);
  }
  const meco::PlanCounts& c = plan.counts;
  py::dict counts;
  counts["num_epochs"] = c.num_epochs;
  counts["documents"] = c.documents;
  counts["documents_cut"] = c.documents_cut;
  counts["documents_plain"] = c.documents_plain;
  counts["documents_empty"] = c.documents_empty;
  counts["body_tokens"] = c.body_tokens;
  counts["prefix_tokens"] = c.prefix_tokens;
  counts["suffix_tokens"] = c.suffix_tokens;
  counts["bos_tokens"] = c.bos_tokens;
  counts["padding_tokens"] = c.padding_tokens;
  counts["alignment_tokens"] = c.alignment_tokens;
  counts["discarded_tokens"] = c.discarded_tokens;
  py::dict result;
  result["counts"] = counts;
  result["pack_offsets"] = to_array(std::move(plan.pack_offsets));
  result["piece_document"] = to_array(std::move(plan.piece_document));
  result["continued_piece"] = to_array(std::move(plan.continued_piece));
  result["continued_begin"] = to_array(std::move(plan.continued_begin));
  result["packs_by_size"] = to_array(std::move(plan.packs_by_size));
  return result;
}

// (kind, tokens) of each run of a piece, from left to right, its padding among them.
std::vector<std::pair<std::string, int64_t>> runs_of(const meco::Piece& piece) {
  std::vector<std::pair<std::string, int64_t>> runs;
  meco::for_each_run(piece, [&](meco::TokenKind kind, int64_t count) {
    if (count > 0) runs.emplace_back(meco::name_of(kind), count);
  });
  if (piece.padding > 0) runs.emplace_back("padding", piece.padding);
  return runs;
}

// Makes samples of one plan over one corpus.
class Assembler {
 public:
  Assembler(py::object corpus, Array<int64_t> pack_offsets, Array<int32_t> piece_document,
            Array<int64_t> continued_piece, Array<int64_t> continued_begin, int64_t capacity,
            int64_t max_documents, int64_t pad_id, const std::string& view, bool train_on_prefix,
            bool train_on_suffix, const std::string& strategy, bool repeat_prefix,
            int64_t repeat_every, int64_t alignment, std::optional<Array<uint8_t>> bin,
            std::optional<Array<int64_t>> sequence_pointers, int token_bytes,
            std::optional<int64_t> vocab_size)
      : corpus_object_(std::move(corpus)),
        corpus_(corpus_object_.cast<const Corpus&>()),
        pack_offsets_(std::move(pack_offsets)),
        piece_document_(std::move(piece_document)),
        continued_piece_(std::move(continued_piece)),
        continued_begin_(std::move(continued_begin)),
        bin_(std::move(bin)),
        sequence_pointers_(std::move(sequence_pointers)) {
    require_1d(pack_offsets_, "pack_offsets");
    require_1d(piece_document_, "piece_document");
    require_1d(continued_piece_, "continued_piece");
    require_1d(continued_begin_, "continued_begin");
    require(bin_.has_value() == sequence_pointers_.has_value(),
            "bin and sequence_pointers come together");
    require(pack_offsets_.size() >= 1, "pack_offsets must not be empty");
    require(continued_piece_.size() == continued_begin_.size(),
            "continued_piece and continued_begin must be equally long");
    if (bin_) {
      require_1d(*bin_, "bin");
      require_1d(*sequence_pointers_, "sequence_pointers");
      meco::check_token_bytes(token_bytes);
      tokens_.bytes = bin_->data();
      tokens_.num_bytes = bin_->size();
      tokens_.sequence_pointers = sequence_pointers_->data();
      tokens_.num_sequences = sequence_pointers_->size();
      tokens_.token_bytes = token_bytes;
    }
    plan_.pack_offsets = pack_offsets_.data();
    plan_.num_packs = pack_offsets_.size() - 1;
    plan_.piece_document = piece_document_.data();
    plan_.num_pieces = piece_document_.size();
    plan_.continued_piece = continued_piece_.data();
    plan_.continued_begin = continued_begin_.data();
    plan_.num_continued = continued_piece_.size();
    meco::AssemblyOptions options;
    options.strategy = meco::parse_strategy(strategy);
    options.repeat_prefix = repeat_prefix;
    options.repeat_every = repeat_every;
    options.alignment = alignment;
    options.capacity = capacity;
    options.max_documents = max_documents;
    options.bos_id = corpus_.bos_id();
    options.pad_id = pad_id;
    options.vocab_size = vocab_size.value_or(INT64_MAX);
    options.view = meco::parse_view(view);
    options.train_on_prefix = train_on_prefix;
    options.train_on_suffix = train_on_suffix;
    options_ = meco::check(options);
  }

  std::vector<meco::Piece> pieces(int64_t pack) const {
    return meco::pieces_of_pack(plan_, corpus_.documents(), pack, options_);
  }

  // (tokens, labels, loss_mask, position_ids, cu_seqlens, max_seqlen, prefix_tokens) of one pack.
  // Bodies lie in `bin` at `sequence_pointers` (bytes), as Megatron's IndexedDataset maps them.
  py::tuple sample(int64_t pack) const {
    require(bin_.has_value(), "this assembler was made without bin");
    const auto found = pieces(pack);
    std::vector<const uint8_t*> sources;
    sources.reserve(found.size());
    for (const meco::Piece& piece : found) {
      sources.push_back(meco::locate(tokens_, corpus_.documents(), piece));
    }
    return assemble(found, sources, tokens_.token_bytes);
  }

  // (capacity,), float32: 1 for the labels of one pack that the comparison of views counts.
  Array<float> compared(int64_t pack) const {
    Array<float> result(options_.capacity);
    meco::compared_of_pack(plan_, corpus_.documents(), pack, options_, result.mutable_data());
    return result;
  }

  // Bodies come one after the other in `bodies`, in the order of `pieces(pack)`.
  py::tuple sample_from_bodies(int64_t pack, const Array<int64_t>& bodies) const {
    const auto found = pieces(pack);
    int64_t total = 0;
    for (const meco::Piece& piece : found) total += piece.body_end - piece.body_begin;
    require(bodies.ndim() == 1 && bodies.size() == total, "bodies do not fit the pack");
    std::vector<const uint8_t*> sources;
    const auto* cursor = reinterpret_cast<const uint8_t*>(bodies.data());
    for (const meco::Piece& piece : found) {
      sources.push_back(cursor);
      cursor += (piece.body_end - piece.body_begin) * 8;
    }
    return assemble(found, sources, 8);
  }

 private:
  py::tuple assemble(const std::vector<meco::Piece>& pieces,
                     const std::vector<const uint8_t*>& sources, int token_bytes) const {
    // One allocation for all arrays of a sample. Tokens and labels are two views of the same
    // numbers, one place apart: half the writing, and a batch copies them apart.
    const int64_t length = options_.capacity;
    const int64_t bounds = meco::num_cu_seqlens(options_);
    const int64_t wide = 2 * length + 2;  // tokens and the last label, positions, prefix tokens
    const int64_t narrow = length + bounds + 1;  // loss mask, cu_seqlens, max_seqlen
    const Array<uint8_t> block(wide * 8 + narrow * 4);
    auto* tokens = reinterpret_cast<int64_t*>(const_cast<uint8_t*>(block.data()));
    int64_t* position_ids = tokens + length + 1;
    int64_t* prefix_tokens = position_ids + length;
    auto* loss_mask = reinterpret_cast<float*>(tokens + wide);
    auto* cu_seqlens = reinterpret_cast<int32_t*>(loss_mask + length);
    int32_t* max_seqlen = cu_seqlens + bounds;
    {
      py::gil_scoped_release release;
      meco::SampleArrays out{tokens,     loss_mask,  position_ids,
                             cu_seqlens, max_seqlen, prefix_tokens};
      meco::assemble(pieces, sources, token_bytes, corpus_.documents(), options_, &out);
    }
    const std::vector<py::ssize_t> scalar;
    return py::make_tuple(
        Array<int64_t>(length, tokens, block), Array<int64_t>(length, tokens + 1, block),
        Array<float>(length, loss_mask, block), Array<int64_t>(length, position_ids, block),
        Array<int32_t>(bounds, cu_seqlens, block),
        Array<int32_t>(scalar, scalar, max_seqlen, block),
        Array<int64_t>(scalar, scalar, prefix_tokens, block));
  }

  py::object corpus_object_;
  const Corpus& corpus_;
  Array<int64_t> pack_offsets_;
  Array<int32_t> piece_document_;
  Array<int64_t> continued_piece_;
  Array<int64_t> continued_begin_;
  std::optional<Array<uint8_t>> bin_;
  std::optional<Array<int64_t>> sequence_pointers_;
  meco::TokenFile tokens_;
  meco::PlanView plan_;
  meco::AssemblyOptions options_;
};

Array<int64_t> permutation(uint64_t size, uint64_t seed, uint64_t stream, int64_t begin,
                           int64_t end) {
  require(begin >= 0 && begin <= end && static_cast<uint64_t>(end) <= size, "range out of bounds");
  require(end - begin <= INT32_MAX, "too many places at once");
  Array<int64_t> result(end - begin);
  int64_t* values = result.mutable_data();
  meco::Permutation(size, seed, stream).fill(static_cast<uint64_t>(begin), end - begin, values);
  return result;
}

py::dict scan_index(const Array<int32_t>& lengths, const Array<int64_t>& pointers,
                    const Array<int64_t>& first_sequences, int64_t token_bytes, int num_threads) {
  require_1d(lengths, "lengths");
  require_1d(pointers, "pointers");
  require_1d(first_sequences, "first_sequences");
  require(lengths.size() == pointers.size(), "lengths and pointers must be equally long");
  const meco::IndexArrays index{lengths.data(),         pointers.data(),        lengths.size(),
                                first_sequences.data(), first_sequences.size(), token_bytes};
  meco::IndexScan scan;
  {
    py::gil_scoped_release release;
    scan = meco::scan_index(index, num_threads);
  }
  py::dict result;
  result["num_tokens"] = scan.num_tokens;
  result["bad_length"] = scan.bad_length;
  result["bad_pointer"] = scan.bad_pointer;
  result["bad_bound"] = scan.bad_bound;
  result["one_sequence_each"] = scan.one_sequence_each;
  return result;
}

// The number of texts in Arrow's form: text i is data[offsets[i], offsets[i + 1]).
int64_t check_texts(const Array<uint8_t>& data, const Array<int32_t>& offsets) {
  require_1d(data, "data");
  require_1d(offsets, "offsets");
  require(offsets.size() >= 1, "offsets must not be empty");
  const int64_t count = offsets.size() - 1;
  const int32_t* borders = offsets.data();
  require(borders[0] >= 0 && borders[count] <= data.size(), "offsets outside of data");
  for (int64_t i = 0; i < count; ++i) require(borders[i] <= borders[i + 1], "offsets must rise");
  return count;
}

// The two halves of each text's hash, (texts, 2).
Array<uint64_t> hash_texts(const Array<uint8_t>& data, const Array<int32_t>& offsets) {
  const int64_t count = check_texts(data, offsets);
  Array<uint64_t> hashes({count, int64_t{2}});
  uint64_t* target = hashes.mutable_data();
  const int32_t* borders = offsets.data();
  for (int64_t i = 0; i < count; ++i) {
    const auto hash = meco::hash_text(data.data() + borders[i], borders[i + 1] - borders[i]);
    target[2 * i] = hash[0];
    target[2 * i + 1] = hash[1];
  }
  return hashes;
}

// Copies of plain URLs in Arrow's form, and which ones are plain.
std::tuple<Array<uint8_t>, Array<int32_t>, Array<bool>> copy_plain_urls(
    const Array<uint8_t>& data, const Array<int32_t>& offsets, bool hosts_only) {
  const int64_t count = check_texts(data, offsets);
  Array<uint8_t> copies(offsets.data()[count] - offsets.data()[0]);
  Array<int32_t> borders(count + 1);
  Array<bool> is_plain(count);
  uint8_t* copies_data = copies.mutable_data();
  int32_t* borders_data = borders.mutable_data();
  auto* plain_data = reinterpret_cast<uint8_t*>(is_plain.mutable_data());
  {
    py::gil_scoped_release release;
    meco::copy_plain_urls(data.data(), offsets.data(), count, hosts_only, copies_data, borders_data,
                          plain_data);
  }
  return {std::move(copies), std::move(borders), std::move(is_plain)};
}

// Numbers of the texts, and the rows where a text appears for the first time.
std::tuple<Array<int32_t>, Array<int64_t>> number_texts(meco::DistinctTexts& distinct,
                                                        const Array<uint8_t>& data,
                                                        const Array<int32_t>& offsets,
                                                        const std::optional<Array<bool>>& valid) {
  const int64_t count = check_texts(data, offsets);
  if (valid) {
    require_1d(*valid, "valid");
    require(valid->size() == count, "valid must be as long as the texts");
  }
  Array<int32_t> ids(count);
  std::vector<int64_t> first_rows;
  {
    int32_t* target = ids.mutable_data();
    const auto* mask = valid ? reinterpret_cast<const uint8_t*>(valid->data()) : nullptr;
    py::gil_scoped_release release;
    distinct.number(data.data(), offsets.data(), mask, count, target, &first_rows);
  }
  return {std::move(ids), to_array(std::move(first_rows))};
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Packing and sample assembly; see csrc/. Private: use megatron_meco.data.";

  m.attr("MAX_CAPACITY") = meco::kMaxCapacity;

  py::class_<meco::Piece>(m, "Piece")
      .def_readonly("document", &meco::Piece::document)
      .def_readonly("body_begin", &meco::Piece::body_begin)
      .def_readonly("body_end", &meco::Piece::body_end)
      .def_property_readonly("prefix_id", [](const meco::Piece& piece) { return piece.prefix.id; })
      .def_property_readonly("prefix_tokens",
                             [](const meco::Piece& piece) { return piece.prefix.tokens; })
      .def_property_readonly("suffix_id", [](const meco::Piece& piece) { return piece.suffix.id; })
      .def_property_readonly("suffix_tokens",
                             [](const meco::Piece& piece) { return piece.suffix.tokens; })
      .def_property_readonly("runs", &runs_of)
      .def_readonly("padding", &meco::Piece::padding)
      .def_readonly("has_bos", &meco::Piece::has_bos);

  py::class_<Corpus>(m, "Corpus")
      .def(py::init<Array<int32_t>, std::optional<Array<int64_t>>, std::optional<Array<int32_t>>,
                    Array<int32_t>, Array<int64_t>, std::optional<Array<int32_t>>, Array<int32_t>,
                    Array<int64_t>, int64_t, uint64_t, uint64_t>(),
           py::kw_only(), py::arg("sequence_lengths").noconvert(),
           py::arg("document_indices").noconvert() = py::none(),
           py::arg("prefix_ids").noconvert() = py::none(),
           py::arg("prefix_tokens").noconvert() = to_array(std::vector<int32_t>{}),
           py::arg("prefix_offsets").noconvert() = to_array(std::vector<int64_t>{0}),
           py::arg("suffix_ids").noconvert() = py::none(),
           py::arg("suffix_tokens").noconvert() = to_array(std::vector<int32_t>{}),
           py::arg("suffix_offsets").noconvert() = to_array(std::vector<int64_t>{0}),
           py::arg("bos_id") = -1, py::arg("plain_seed") = 0, py::arg("plain_threshold") = 0)
      .def_property_readonly("one_sequence_each", &Corpus::one_sequence_each)
      .def_property_readonly("longest_head", &Corpus::longest_head)
      .def("longest_metadata", &Corpus::longest_metadata, py::arg("enough"));

  py::class_<Assembler>(m, "Assembler")
      .def(py::init<py::object, Array<int64_t>, Array<int32_t>, Array<int64_t>, Array<int64_t>,
                    int64_t, int64_t, int64_t, const std::string&, bool, bool, const std::string&,
                    bool, int64_t, int64_t, std::optional<Array<uint8_t>>,
                    std::optional<Array<int64_t>>, int, std::optional<int64_t>>(),
           py::kw_only(), py::arg("corpus"), py::arg("pack_offsets").noconvert(),
           py::arg("piece_document").noconvert(), py::arg("continued_piece").noconvert(),
           py::arg("continued_begin").noconvert(), py::arg("capacity"), py::arg("max_documents"),
           py::arg("pad_id"), py::arg("view"), py::arg("train_on_prefix"),
           py::arg("train_on_suffix") = true, py::arg("strategy"), py::arg("repeat_prefix"),
           py::arg("repeat_every") = 0, py::arg("alignment") = 1,
           py::arg("bin").noconvert() = py::none(),
           py::arg("sequence_pointers").noconvert() = py::none(), py::arg("token_bytes") = 8,
           py::arg("vocab_size") = py::none())
      .def("pieces", &Assembler::pieces, py::arg("pack"))
      .def("sample", &Assembler::sample, py::arg("pack"))
      .def("compared", &Assembler::compared, py::arg("pack"))
      .def("sample_from_bodies", &Assembler::sample_from_bodies, py::arg("pack"),
           py::arg("bodies").noconvert());

  m.def("build_plan", &build_plan, py::arg("corpus"), py::kw_only(), py::arg("strategy"),
        py::arg("capacity"), py::arg("max_documents"), py::arg("num_packs"),
        py::arg("first_document"), py::arg("num_documents"), py::arg("range_begin"),
        py::arg("range_end"), py::arg("seed"), py::arg("repeat_prefix"),
        py::arg("repeat_every") = 0, py::arg("alignment") = 1, py::arg("num_threads"),
        py::arg("progress") = py::none());
  m.def("permutation", &permutation, py::arg("size"), py::arg("seed"), py::arg("stream"),
        py::arg("begin"), py::arg("end"));
  m.def("scan_index", &scan_index, py::arg("lengths").noconvert(), py::arg("pointers").noconvert(),
        py::arg("first_sequences").noconvert(), py::kw_only(), py::arg("token_bytes"),
        py::arg("num_threads"));
  py::class_<meco::DistinctTexts>(m, "DistinctTexts")
      .def(py::init<>())
      .def("__len__", &meco::DistinctTexts::size)
      .def("number", &number_texts, py::arg("data").noconvert(), py::arg("offsets").noconvert(),
           py::arg("valid").noconvert() = py::none());
  m.def("copy_plain_urls", &copy_plain_urls, py::arg("data").noconvert(),
        py::arg("offsets").noconvert(), py::kw_only(), py::arg("hosts_only"));
  m.def("hash_texts", &hash_texts, py::arg("data").noconvert(), py::arg("offsets").noconvert());
  m.def(
      "hash_text",
      [](const py::bytes& text) {
        const std::string bytes = text;
        const auto hash = meco::hash_text(reinterpret_cast<const uint8_t*>(bytes.data()),
                                          static_cast<int64_t>(bytes.size()));
        return std::make_tuple(hash[0], hash[1]);
      },
      py::arg("text"));
  m.def("hash_pair", &meco::hash_pair, py::arg("a"), py::arg("b"));
}
