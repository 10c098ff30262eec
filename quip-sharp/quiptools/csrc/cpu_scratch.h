// Work space of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace quiptools {

// Numbers that begin at a cache line, as the rows of tiles want to. The content is arbitrary.
template <class T>
class Lines {
 public:
  T* of(int64_t size) {
    if (size > size_) {
      place_.reset(static_cast<T*>(::operator new(size * sizeof(T), kLine)));
      size_ = size;
    }
    return place_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* place) const { ::operator delete(place, kLine); }
  };
  std::unique_ptr<T, Free> place_;
  int64_t size_ = 0;
};

// Kept from one call to the next, for one purpose each: pages that are new each time cost more than a small product.
template <class Purpose, class T>
T* scratch(int64_t size) {
  thread_local Lines<T> kept;
  return kept.of(size);
}

} // namespace quiptools
