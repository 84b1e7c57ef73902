// The plain cases among URLs, which need no regular expression.
#pragma once

#include <cstdint>

namespace meco {

// Copies of n URLs without their scheme, or their hosts alone in lower case and without dots at the
// end. A plain URL is `http://` or `https://`, a host of letters, digits, `.` and `-`, and nothing
// or a path of printable ASCII without `@`. Of others is_plain is 0 and the copy is empty. URL i is
// data[offsets[i], offsets[i + 1]); `copies` has room for all of them, borders for n + 1.
void copy_plain_urls(const uint8_t* data, const int32_t* offsets, int64_t count, bool hosts_only,
                     uint8_t* copies, int32_t* borders, uint8_t* is_plain);

}  // namespace meco
