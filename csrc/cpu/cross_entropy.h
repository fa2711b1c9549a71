// Cross entropy over rows. Included inside each instruction set's namespace, after simd.h; the fields of
// CrossEntropy are described in kernels.h.

INLINE int64_t target_of(const CrossEntropy& p, int64_t i) {
  if (p.target_bytes == 8) return ((const int64_t*)p.targets)[i];
  return p.target_bytes == 4 ? ((const int32_t*)p.targets)[i] : ((const uint8_t*)p.targets)[i];
}

INLINE bool is_valid(const CrossEntropy& p, int64_t target) {
  return target != p.ignore_index && target >= 0 && target < p.classes;
}

INLINE float scale_of(const CrossEntropy& p, int64_t i) {
  return p.scale_of_row ? p.scale * p.scale_of_row[i * p.scale_stride] : p.scale;
}

template <bool kCap>
INLINE Vec capped(Vec x, float softcap) {
  return kCap ? softcap * tanh(x / softcap) : x;
}

INLINE Vec slope(Vec x, float softcap) {  // of softcap, where it gives x
  return 1.0f - (x / softcap) * (x / softcap);
}

INLINE bool is_finite(float x) { return x - x == 0; }

// --- few classes: a lane a row, so that no lane idles and nothing is summed across lanes ---

constexpr int64_t kFewClasses = 32;  // beyond these, rows one by one are as fast

template <class T, bool kCap>
void few_classes(const CrossEntropy& p, int64_t begin, int64_t end, double* loss_sum, int64_t* counts) {
  typedef typename T::Raw Raw;
  constexpr int64_t kRounded = (kFewClasses + kLanes - 1) / kLanes * kLanes;
  Vec x[kRounded], e[kRounded];  // a vector a class
  const int n = p.classes;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int rows = end - first < kLanes ? end - first : kLanes;  // lanes past the end are ignored rows
    for (int c = 0; c < n; c += kLanes) {
      for (int lane = 0; lane < rows; ++lane)
        x[c + lane] = load_at<T>((const Raw*)p.logits + p.logits_at.offset(first + lane), c, n, 0);
      for (int lane = rows; lane < kLanes; ++lane) x[c + lane] = Vec{};
      transpose(x + c);
    }
    int32_t targets[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t t = lane < rows ? target_of(p, first + lane) : -1;
      targets[lane] = is_valid(p, t) ? t : -1;
    }
    const IVec target = load<IVec>(targets), valid = target >= 0;
    Vec weight = splat(1.0f), scale = splat(p.scale);
    if (p.weight)
      for (int lane = 0; lane < kLanes; ++lane)
        weight[lane] = targets[lane] < 0 ? 0 : p.weight[targets[lane]];
    if (p.scale_of_row)
      for (int lane = 0; lane < rows; ++lane) scale[lane] = scale_of(p, first + lane);

    Vec top = splat(-__builtin_inff()), at_target{}, sum{}, smooth{};
    IVec ahead{};
    for (int c = 0; c < n; ++c) {
      top = max(x[c], top);
      at_target = target == c ? x[c] : at_target;
    }
    if (counts)
      for (int c = 0; c < n; ++c) ahead -= (x[c] > at_target) | ((x[c] == at_target) & (target > c));
    if (kCap) {
      top = capped<kCap>(top, p.softcap);
      at_target = capped<kCap>(at_target, p.softcap);
    }
    for (int c = 0; c < n; ++c) {
      if (kCap) x[c] = capped<kCap>(x[c], p.softcap);
      e[c] = exp(x[c] - top);
      sum += e[c];
      if (p.smoothing > 0) smooth += (p.weight ? p.weight[c] : 1.0f) * (x[c] - top);
    }
    const Vec log_sum = log(sum), lse = top + log_sum;
    const IVec finite = (top - top == 0.0f) & (sum == sum);

    if (!p.backward) {
      Vec loss = weight * (1.0f - p.smoothing) * (log_sum - (at_target - top));
      if (p.smoothing > 0) loss += p.smoothing / n * (p.weight_sum * log_sum - smooth);
      if (p.z_loss != 0) loss += p.z_loss * lse * lse;
      loss = valid ? (finite ? loss : splat(__builtin_nanf(""))) : Vec{};
      *loss_sum += sum_in_double(loss);
      if (p.row_loss)
        for (int lane = 0; lane < rows; ++lane) p.row_loss[first + lane] = loss[lane];
      if (p.saved_max)
        for (int lane = 0; lane < rows; ++lane) {
          p.saved_max[first + lane] = finite[lane] ? top[lane] : __builtin_nanf("");
          p.saved_sum[first + lane] = sum[lane];
        }
      if (counts) {
        counts[0] += count_lanes(valid & ~finite);
        for (int k = 0; k < p.num_topk; ++k) {
          const int32_t bound = p.topk[k] < n ? p.topk[k] : n;
          counts[1 + k] += count_lanes(valid & finite & (ahead < bound));
        }
      }
    }
    if (!p.out) continue;

    const Vec on_target = weight * (1.0f - p.smoothing) * scale, everywhere = p.smoothing / n * scale;
    Vec of_softmax = on_target;
    if (p.smoothing > 0) of_softmax += everywhere * p.weight_sum;
    if (p.z_loss != 0) of_softmax += 2.0f * p.z_loss * lse * scale;
    of_softmax = finite ? of_softmax / sum : splat(__builtin_nanf(""));
    const IVec counted = valid & (p.zero ? IVec{} : splat(-1));
    for (int c = 0; c < n; ++c) {
      Vec g = e[c] * of_softmax - (target == c ? on_target : Vec{});
      if (p.smoothing > 0) g -= everywhere * (p.weight ? p.weight[c] : 1.0f);
      if (kCap) g *= slope(x[c], p.softcap);
      e[c] = counted ? g : Vec{};
    }
    for (int c = 0; c < n; c += kLanes) {
      transpose(e + c);
      for (int lane = 0; lane < rows; ++lane) {
        Raw* row = (Raw*)p.out + p.out_at.offset(first + lane) + c;
        n - c >= kLanes ? store(row, T::narrow(e[c + lane])) : store_some<T>(row, n - c, e[c + lane]);
      }
    }
  }
}

// --- many classes: row by row, in chunks that stay in the first-level cache ---

// Classes a step: at most 16 KiB of float32, which stay in the first-level cache, and 256 terms a lane, so
// that adding small exponentials to a large one costs no more in float32 than in the reference.
constexpr int64_t kChunk = 256 * kLanes;
static_assert(kChunk >= kSmallestChunk && kKept % kChunk == 0);

// Lanes 0 to n of x; the others 0.
INLINE Vec first(Vec x, int64_t n) { return lanes_below(n) ? x : Vec{}; }

template <class T>
float largest(const typename T::Raw* p, int64_t n) {
  typedef typename T::Lanes Lanes;
  Vec a = splat(-__builtin_inff()), b = a, c = a, d = a;  // four chains hide the latency
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = max(T::widen(load<Lanes>(p + i)), a);
    b = max(T::widen(load<Lanes>(p + i + kLanes)), b);
    c = max(T::widen(load<Lanes>(p + i + 2 * kLanes)), c);
    d = max(T::widen(load<Lanes>(p + i + 3 * kLanes)), d);
  }
  for (; i < n; i += kLanes) a = max(load_at<T>(p, i, n, -__builtin_inff()), a);
  return max_lane(max(max(a, b), max(c, d)));
}

// How many of p[0..n) are larger than x, or as large where `or_equal`.
template <class T>
int64_t count_above(const typename T::Raw* p, int64_t n, float x, bool or_equal) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 24) {  // a lane counts in 32 bits
    const int64_t end = n - begin < 1 << 24 ? n : begin + (1 << 24);
    IVec lanes{};
    for (int64_t c = begin; c < end; c += kLanes) {
      const Vec y = load_at<T>(p, c, end, __builtin_nanf(""));
      lanes -= or_equal ? y >= x : y > x;
    }
    count += sum_lanes(lanes);
  }
  return count;
}

struct RowSums {
  float top = -__builtin_inff();   // the largest x
  double sum = 0;                  // of exp(x - top)
  double smooth = 0, weights = 0;  // of w_c (x_c - top), of w_c; with smoothing only
};

// Whether the gradient takes the exponentials from the first pass. Beside streaming stores, which leave the
// arithmetic idle, computing them again is up to a fifth faster than the traffic in the second-level cache.
template <bool kCap>
INLINE bool keeps(const CrossEntropy& p) {
  return p.out && !p.backward && !p.stream && !kCap;
}

// One read of a row. Keeps exp(x - top of the chunk) of the first kKept classes for the gradient, except
// under softcap, where the gradient needs x itself again.
template <class T, bool kCap>
RowSums read_row(const CrossEntropy& p, const typename T::Raw* row, const typename T::Raw* next, float* kept,
                 float* chunk_top) {
  RowSums result;
  for (int64_t begin = 0; begin < p.classes; begin += kChunk) {
    const int64_t n = p.classes - begin < kChunk ? p.classes - begin : kChunk;
    const typename T::Raw* x_in = row + begin;
    const bool keep = keeps<kCap>(p) && begin < kKept;
    const float top = capped<kCap>(splat(largest<T>(x_in, n)), p.softcap)[0];
    const float shift = top == -__builtin_inff() ? 0.0f : top;  // -inf - -inf would be NaN
    Vec sum{}, smooth{}, weights{};
    const auto add = [&](int64_t c, Vec logits, int64_t lanes) __attribute__((always_inline)) {
      __builtin_prefetch(next + begin + c, 0, 2);  // the next row arrives while this one is computed
      const Vec x = capped<kCap>(logits, p.softcap) - shift;
      const Vec e = lanes < kLanes ? first(exp(x), lanes) : exp(x);
      sum += e;
      if (keep) store(kept + begin + c, e);
      if (p.smoothing > 0) {
        const Vec w = p.weight ? load_at<Float32>(p.weight + begin, c, n, 0) : splat(1.0f);
        smooth += lanes < kLanes ? first(w * x, lanes) : w * x;
        weights += lanes < kLanes ? first(w, lanes) : w;
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) add(c, T::widen(load<typename T::Lanes>(x_in + c)), kLanes);
    if (c < n) add(c, load_some<T>(x_in + c, n - c, 0), n - c);

    chunk_top[begin / kChunk] = top;
    const float new_top = top > result.top ? top : result.top;
    if (new_top > result.top) {
      result.sum *= __builtin_exp(result.top - new_top);
      if (begin && p.smoothing > 0) result.smooth += result.weights * ((double)result.top - new_top);
    }
    result.sum += sum_in_double(sum) * (top == new_top ? 1 : __builtin_exp(shift - new_top));
    result.top = new_top;
    if (p.smoothing > 0) {
      const double chunk_weights = sum_in_double(weights);
      const double drop = new_top == -__builtin_inff() ? 0 : (double)shift - new_top;
      result.smooth += sum_in_double(smooth) + chunk_weights * drop;
      result.weights += chunk_weights;
    }
  }
  return result;
}

// (softmax_c * of_softmax - w_c * everywhere) * slope of softcap, for every class; `over_sum` is of_softmax /
// sum.
template <class T, bool kCap>
void write_row(const CrossEntropy& p, const typename T::Raw* row, typename T::Raw* out, const float* kept,
               const float* chunk_top, float row_top, double over_sum, float everywhere) {
  for (int64_t begin = 0; begin < p.classes; begin += kChunk) {
    const int64_t n = p.classes - begin < kChunk ? p.classes - begin : kChunk;
    const float top = p.backward ? row_top : chunk_top[begin / kChunk];
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    const float factor = top == row_top ? over_sum : over_sum * __builtin_exp((double)top - row_top);
    const bool keep = keeps<kCap>(p) && begin < kKept;
    const auto gradient = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
      const int64_t end = c + lanes;
      Vec x{};
      if (!keep) x = capped<kCap>(load_at<T>(row + begin, c, end, 0), p.softcap);
      Vec g = factor * (keep ? load<Vec>(kept + begin + c) : exp(x - shift));
      if (p.smoothing > 0)
        g -= everywhere * (p.weight ? load_at<Float32>(p.weight + begin, c, end, 0) : splat(1.0f));
      return kCap ? g * slope(x, p.softcap) : g;
    };
    typename T::Raw* to = out + begin;
    int64_t c = 0;
    if (p.stream) {
      constexpr int64_t kSize = sizeof(typename T::Lanes);
      const int64_t to_boundary = -(intptr_t)to & (kSize - 1), head = to_boundary / (int64_t)sizeof(*to);
      c = head < n ? head : n;
      if (c) store_some<T>(to, c, gradient(0, c));
      for (; c + kLanes <= n; c += kLanes) stream(to + c, T::narrow(gradient(c, kLanes)));
    } else {
      for (; c + kLanes <= n; c += kLanes) store(to + c, T::narrow(gradient(c, kLanes)));
    }
    if (c < n) store_some<T>(to + c, n - c, gradient(c, n - c));
  }
}

template <class T, bool kCap>
void many_classes(const CrossEntropy& p, int64_t begin, int64_t end, float* scratch, double* loss_sum,
                  int64_t* counts) {
  typedef typename T::Raw Raw;
  float *const chunk_top = scratch, *const kept = scratch + p.classes / kChunk + 1;
  for (int64_t i = begin; i < end; ++i) {
    const Raw* row = (const Raw*)p.logits + p.logits_at.offset(i);
    const Raw* next = (const Raw*)p.logits + p.logits_at.offset(i + 1 < end ? i + 1 : i);
    Raw* out = p.out ? (Raw*)p.out + p.out_at.offset(i) : nullptr;
    const int64_t target = target_of(p, i);
    const bool valid = is_valid(p, target);
    const float scale = p.out ? scale_of(p, i) : 0;
    const auto fill = [&](float value) {
      const typename T::Lanes lanes = T::narrow(splat(value));
      int64_t c = 0;
      for (; c + kLanes <= p.classes; c += kLanes) store(out + c, lanes);
      for (; c < p.classes; ++c) out[c] = lanes[0];
    };

    RowSums sums;
    bool finite = true;
    double weight = 0, log_sum = 0, loss = 0, target_x = 0;
    float target_logit = 0;
    if (valid) {
      if (p.backward) {
        sums.top = p.saved_max[i];
        sums.sum = p.saved_sum[i];
      } else {
        sums = read_row<T, kCap>(p, row, next, kept, chunk_top);
      }
      finite = is_finite(sums.top) && sums.sum == sums.sum;
      weight = p.weight ? p.weight[target] : 1;
      log_sum = __builtin_log(sums.sum);
      target_logit = load_some<T>(row + target, 1, 0)[0];
      target_x = capped<kCap>(splat(target_logit), p.softcap)[0];
    }
    const double lse = sums.top + log_sum, every = p.smoothing / p.classes;
    if (!p.backward) {
      if (valid) {
        loss = weight * (1 - p.smoothing) * (log_sum - (target_x - sums.top));
        if (p.smoothing > 0) loss += every * (p.weight_sum * log_sum - sums.smooth);
        if (p.z_loss != 0) loss += p.z_loss * lse * lse;
        if (!finite) loss = __builtin_nan("");
      }
      *loss_sum += loss;
      if (p.row_loss) p.row_loss[i] = loss;
      if (p.saved_max) p.saved_max[i] = finite ? sums.top : __builtin_nanf("");
      if (p.saved_max) p.saved_sum[i] = sums.sum;
      if (counts && valid && !finite) ++counts[0];
      if (counts && valid && finite) {
        // The rank by another look at the row, which is in the cache. For k = 1 alone it is seldom needed: a
        // target below the largest logit is not first, and one that is the largest has none above it.
        const int64_t highest_k = p.topk[p.num_topk - 1];
        const bool known = !kCap && highest_k == 1;
        int64_t rank = known && target_logit < sums.top ? 1 : count_above<T>(row, target, target_logit, true);
        if (!known && rank < highest_k)
          rank += count_above<T>(row + target + 1, p.classes - target - 1, target_logit, false);
        for (int k = 0; k < p.num_topk; ++k) counts[1 + k] += rank < p.topk[k];
      }
    }
    if (!out) continue;
    if (!valid || p.zero) {
      fill(0);
    } else if (!finite) {
      fill(__builtin_nanf(""));
    } else {
      const double on_target = weight * (1 - p.smoothing) * scale, everywhere = every * scale;
      double of_softmax = on_target;
      if (p.smoothing > 0) of_softmax += everywhere * p.weight_sum;
      if (p.z_loss != 0) of_softmax += 2 * p.z_loss * lse * scale;
      of_softmax /= sums.sum;
      write_row<T, kCap>(p, row, out, kept, chunk_top, sums.top, of_softmax, everywhere);
      double g = __builtin_exp(target_x - sums.top) * of_softmax - everywhere * weight - on_target;
      if (kCap) g *= slope(splat((float)target_x), p.softcap)[0];
      store_some<T>(out + target, 1, splat((float)g));
    }
  }
}

template <class T>
void with_type(const CrossEntropy& p, int64_t begin, int64_t end, float* scratch, double* loss,
               int64_t* counts) {
  if (p.classes <= kFewClasses) {
    p.softcap == 0 ? few_classes<T, false>(p, begin, end, loss, counts)
                   : few_classes<T, true>(p, begin, end, loss, counts);
  } else {
    p.softcap == 0 ? many_classes<T, false>(p, begin, end, scratch, loss, counts)
                   : many_classes<T, true>(p, begin, end, scratch, loss, counts);
  }
}

void cross_entropy(const CrossEntropy& p, int64_t begin, int64_t end, float* scratch, double* loss,
                   int64_t* counts) {
#if defined(__SSE2__)
  // Results too small to be normal numbers become 0: computing them exactly would cost 100 times as much.
  const unsigned state = _mm_getcsr();
  _mm_setcsr(state | _MM_FLUSH_ZERO_ON);
#endif
  if (p.dtype == kFloat32) with_type<Float32>(p, begin, end, scratch, loss, counts);
  if (p.dtype == kBFloat16) with_type<BFloat16>(p, begin, end, scratch, loss, counts);
  if (p.dtype == kFloat16) with_type<Float16>(p, begin, end, scratch, loss, counts);
#if defined(__SSE2__)
  if (p.stream) _mm_sfence();  // who reads the gradient in another thread finds it
  _mm_setcsr(state);
#endif
}
