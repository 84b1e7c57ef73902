#include "url.h"

#include <array>
#include <cstring>

namespace meco {

namespace {

// Per byte: the lower-case character of a host, or 0; and whether it may stand in a plain path.
struct Tables {
  std::array<uint8_t, 256> host{};
  std::array<bool, 256> path{};
  constexpr Tables() {
    for (int c = 0; c < 256; ++c) {
      const bool is_upper = c >= 'A' && c <= 'Z';
      const bool is_other =
          (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-';
      if (is_upper || is_other) host[c] = static_cast<uint8_t>(is_upper ? c - 'A' + 'a' : c);
      path[c] = c > ' ' && c < 0x7F && c != '@';
    }
  }
};
constexpr Tables kTables;

// Where the host begins behind the scheme, or the end.
const uint8_t* behind_scheme(const uint8_t* begin, const uint8_t* end) {
  const int64_t size = end - begin;
  if (size > 7 && std::memcmp(begin, "http://", 7) == 0) return begin + 7;
  if (size > 8 && std::memcmp(begin, "https://", 8) == 0) return begin + 8;
  return end;
}

}  // namespace

void copy_plain_urls(const uint8_t* data, const int32_t* offsets, int64_t count, bool hosts_only,
                     uint8_t* copies, int32_t* borders, uint8_t* is_plain) {
  int32_t used = 0;
  for (int64_t i = 0; i < count; ++i) {
    borders[i] = used;
    const uint8_t* end = data + offsets[i + 1];
    const uint8_t* host = behind_scheme(data + offsets[i], end);
    const uint8_t* host_end = host;
    while (host_end < end && kTables.host[*host_end] != 0) ++host_end;
    bool plain = host_end > host && (host_end == end || *host_end == '/');
    for (const uint8_t* c = host_end; plain && c < end; ++c) plain = kTables.path[*c];
    if (plain && hosts_only) {
      while (host_end > host && host_end[-1] == '.') --host_end;
      plain = host_end > host;
      end = host_end;
    }
    is_plain[i] = plain;
    if (!plain) continue;
    for (const uint8_t* c = host; hosts_only && c < end; ++c) copies[used++] = kTables.host[*c];
    if (!hosts_only) {
      std::memcpy(copies + used, host, static_cast<size_t>(end - host));
      used += static_cast<int32_t>(end - host);
    }
  }
  borders[count] = used;
}

}  // namespace meco
