#include "layout.h"

#include <stdexcept>

namespace meco {

Strategy parse_strategy(const std::string& name) {
  if (name == "truncate") return Strategy::kTruncate;
  if (name == "split") return Strategy::kSplit;
  if (name == "best-fit") return Strategy::kBestFit;
  throw std::invalid_argument("unknown packing strategy: " + name);
}

const char* name_of(TokenKind kind) {
  switch (kind) {
    case TokenKind::kBos:
      return "bos";
    case TokenKind::kPrefix:
    case TokenKind::kRepeated:
      return "prefix";
    case TokenKind::kBody:
      return "body";
    default:
      return "suffix";
  }
}

void check(PackRules* rules) {
  if (rules->capacity < 2 || rules->capacity > kMaxCapacity) {
    throw std::invalid_argument("capacity must be 2 to 67,108,864");
  }
  if (rules->alignment < 1 || rules->capacity % rules->alignment != 0) {
    throw std::invalid_argument("the capacity must be a multiple of the alignment");
  }
  if (rules->max_documents < 1) throw std::invalid_argument("max_documents must be at least 1");
  if (rules->repeat_every < 0) throw std::invalid_argument("repeat_every must not be negative");
  rules->repeat_every = std::min(rules->repeat_every, rules->capacity);
  rules->max_documents = std::min(rules->max_documents, rules->capacity);
}

}  // namespace meco
