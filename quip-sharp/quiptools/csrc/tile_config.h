// What the tiles of AMX are told of their sizes.
#pragma once

#include <cstdint>

namespace quiptools {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {}; // of a row
  uint8_t rows[16] = {};

  void set(int tile, int64_t height, int64_t row_bytes) {
    rows[tile] = static_cast<uint8_t>(height);
    bytes[tile] = static_cast<uint16_t>(row_bytes);
  }
};

} // namespace quiptools
