#include "attention/attend.h"

#include <algorithm>
#include <cstring>

#include "core/cpu/vector.h"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int64_t kKeys = 64;     // of a tile; its keys stand at multiples of this
constexpr int64_t kSplit = 1024;  // keys that are summed up before they are joined with those before
constexpr int64_t kRows = 128;    // queries, times their heads that share a key, that see a tile while it is loaded
constexpr int64_t kMacsPerThread = 1 << 19;  // less is done sooner than a second thread wakes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// The bits low .. high - 1 of a word.
FD_INLINE uint64_t bits_between(int64_t low, int64_t high) {
  low = std::clamp<int64_t>(low, 0, kKeys);
  high = std::clamp<int64_t>(high, low, kKeys);
  const uint64_t below_high = high == kKeys ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  const uint64_t below_low = low == kKeys ? ~uint64_t{0} : (uint64_t{1} << low) - 1;
  return below_high & ~below_low;
}

// --- what a sequence's queries see --------------------------------------------------------------------------------

struct Sequence {
  const int32_t* table;
  const std::byte* q;    // of its first node
  const uint32_t* tree;  // [num_nodes, words]; nullptr = chain
  const int32_t* coded;  // [num_nodes]; nullptr = `coded_end` for all
  int64_t index, first_row, num_nodes, length, words;
  int64_t base;                    // position of the first node: keys below it are seen by all, but for a window
  int64_t coded_begin, coded_end;  // keys below coded_begin lie in pages, from coded_end on in the ring, else in both
  int64_t window;
  bool causal;

  // Ancestors of a node.
  int64_t depth(int64_t node) const {
    if (!tree) return node;
    int64_t count = 0;
    for (int64_t n = 0; n < num_nodes; ++n) count += n != node && (tree[node * words + n / 32] >> n % 32 & 1);
    return count;
  }

  // Bit i: whether the node sees key first + i.
  uint64_t seen(int64_t node, int64_t first) const {
    const int64_t depth_here = tree || window ? depth(node) : node;
    const int64_t low = window ? base + depth_here - window + 1 : 0;
    if (!tree) return bits_between(low - first, (causal ? base + node + 1 : length) - first);
    uint64_t bits = bits_between(low - first, base - first);
    for (int64_t n = std::max<int64_t>(0, first - base); n < num_nodes && base + n < first + kKeys; ++n) {
      const bool seen = tree[node * words + n / 32] >> n % 32 & 1;
      if (seen && (!window || depth_here - depth(n) < window)) bits |= uint64_t{1} << (base + n - first);
    }
    return bits;
  }
};

int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

int64_t tail_of(const AttendArgs& a, int64_t b) { return a.tail_lens ? a.tail_lens[b] : 0; }

Sequence sequence_of(const AttendArgs& a, int64_t b) {
  Sequence s = {};
  s.index = b;
  s.table = a.page_table + b * a.page_table_stride;
  s.length = a.kv_lens[b];
  s.window = a.window;
  s.causal = a.causal;
  int64_t q_row;  // elements
  if (a.group_start) {
    s.first_row = a.group_start[b];
    s.num_nodes = a.group_start[b + 1] - s.first_row;
    q_row = s.first_row * a.q_slot_stride;
  } else {
    s.first_row = b * a.num_slots;
    s.num_nodes = a.num_queries ? a.num_queries[b] : a.num_slots;
    q_row = b * a.q_batch_stride;
  }
  s.q = static_cast<const std::byte*>(a.q) + q_row * element_size(a.dtype);
  s.base = s.length - s.num_nodes;
  s.coded_begin = s.coded_end = s.length - tail_of(a, b);
  if (a.coded_lens && s.num_nodes > 0 && s.num_nodes <= a.num_slots) {
    s.coded = a.coded_lens + b * a.num_slots;
    s.coded_begin = s.coded_end = s.coded[0];
    for (int64_t i = 1; i < s.num_nodes; ++i) {
      s.coded_begin = std::min<int64_t>(s.coded_begin, s.coded[i]);
      s.coded_end = std::max<int64_t>(s.coded_end, s.coded[i]);
    }
  }
  if (a.tree_mask) {
    s.words = ceil_div(a.num_slots, 32);
    s.tree = reinterpret_cast<const uint32_t*>(a.tree_mask) + b * a.num_slots * s.words;
  }
  return s;
}

int32_t check(const AttendArgs& a, int64_t b) {
  const Sequence s = sequence_of(a, b);
  if (s.num_nodes < 0) return kStatusBadLength;
  if (a.group_start ? s.first_row < 0 || s.first_row + s.num_nodes > a.num_rows
                    : s.num_nodes > a.num_slots || s.num_nodes > s.length)
    return kStatusBadLength;
  const int64_t room = a.max_pages * a.pages.page_size, tail = tail_of(a, b);
  if (s.length < 0 || tail < 0 || tail > std::min(s.length, a.pages.tail_size)) return kStatusBadLength;
  if (s.coded_begin < s.length - tail || s.coded_end > std::min(s.length, room)) return kStatusBadLength;
  for (int64_t i = 0; i < ceil_div(s.coded_end, a.pages.page_size); ++i)
    if (s.table[i] < 0 || s.table[i] >= a.pages.num_pages) return kStatusBadPage;
  return 0;
}

// --- cached keys and values as numbers ----------------------------------------------------------------------------

template <class C, class T>
FD_INLINE void load_run(const T* from, int64_t n, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class C>
void load_plain(DType dtype, const void* from, int64_t n, C* to) {
  dispatch_logits(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<C, double> || !std::is_same_v<T, double>) {
      load_run(static_cast<const T*>(from), n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(static_cast<const T*>(from)[i]);
    }
  });
}

// Channels of one head of one token, coded per token.
template <class C>
void load_coded(const KVPages& p, const std::byte* data, const std::byte* scale, C* to) {
  const auto* code = reinterpret_cast<const uint8_t*>(data);
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    const auto* scales = reinterpret_cast<const float*>(scale);
    for (int64_t d = 0; d < p.head_dim; ++d)
      to[d] = static_cast<C>(p.scheme == kKVFp8E4M3 ? decode_e4m3(code[d]) : decode_e5m2(code[d])) *
              scales[p.static_scale ? 0 : d / p.group];
    return;
  }
  const auto* steps = reinterpret_cast<const Half*>(scale);
  const int64_t bits = code_bits(p.scheme), bytes = p.head_dim * bits / 8;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const int64_t g = d / p.group;
    const int n = code[d % bytes] >> bits * (d / bytes) & ((1 << bits) - 1);
    to[d] = static_cast<C>(n) * static_cast<C>(load(steps[2 * g])) + static_cast<C>(load(steps[2 * g + 1]));
  }
}

// Where keys or values of a token lie in its page.
struct Spot {
  const std::byte *data, *scale;
};

int64_t data_size(const KVPages& p) { return p.scheme == kKVPlain ? element_size(p.dtype) : 1; }
int64_t scale_size(const KVPages& p) { return p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2 ? 4 : 2; }

Spot spot_in_page(const KVPages& p, const KVStore& s, int64_t page, int64_t offset, int64_t head) {
  const auto* data = static_cast<const std::byte*>(s.data);
  const auto* scale = static_cast<const std::byte*>(s.scale);
  return {data + (page * s.page_stride + offset * s.token_stride + head * s.head_stride) * data_size(p),
          scale ? scale + (page * s.scale_page_stride + offset * s.scale_token_stride + head * s.scale_head_stride) *
                              scale_size(p)
                : nullptr};
}

// Channels of a token's key that is coded per channel.
template <class C>
void load_channel_coded(const KVPages& p, int64_t page, int64_t offset, int64_t head, C* to) {
  const int64_t bits = code_bits(p.scheme), bytes = p.group * bits / 8, width = p.page_size * bits / 8;
  const int64_t group = offset / p.group, at = offset % p.group;
  const auto* code = static_cast<const uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                     group * bytes + at % bytes;
  const auto* step = static_cast<const Half*>(p.k.scale) + page * p.k.scale_page_stride + head * p.k.scale_head_stride +
                     group * 2 * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const int n = code[d * width] >> bits * (at / bytes) & ((1 << bits) - 1);
    to[d] = static_cast<C>(n) * static_cast<C>(load(step[d])) + static_cast<C>(load(step[p.head_dim + d]));
  }
}

template <class C>
void load_key(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  const KVPages& p = a.pages;
  if (ring) {
    const int64_t at =
        s.index * p.k.tail_batch_stride + position % p.tail_size * p.k.tail_token_stride + head * p.k.tail_head_stride;
    return load_plain(p.tail_dtype, static_cast<const std::byte*>(p.k.tail) + at * element_size(p.tail_dtype),
                      p.head_dim, to);
  }
  const int64_t page = s.table[position / p.page_size], offset = position % p.page_size;
  if (is_kivi(p.scheme)) return load_channel_coded(p, page, offset, head, to);
  const Spot spot = spot_in_page(p, p.k, page, offset, head);
  if (p.scheme == kKVPlain) return load_plain(p.dtype, spot.data, p.head_dim, to);
  load_coded(p, spot.data, spot.scale, to);
}

template <class C>
void load_value(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  const KVPages& p = a.pages;
  if (ring) {
    const int64_t at =
        s.index * p.v.tail_batch_stride + position % p.tail_size * p.v.tail_token_stride + head * p.v.tail_head_stride;
    return load_plain(p.tail_dtype, static_cast<const std::byte*>(p.v.tail) + at * element_size(p.tail_dtype),
                      p.head_dim, to);
  }
  const Spot spot = spot_in_page(p, p.v, s.table[position / p.page_size], position % p.page_size, head);
  if (p.scheme == kKVPlain) return load_plain(p.dtype, spot.data, p.head_dim, to);
  load_coded(p, spot.data, spot.scale, to);
}

// --- arithmetic ---------------------------------------------------------------------------------------------------

// A register of C, read from any address of a C, and a block of the product below that fits into the registers.
#if FD_CPU_LEVEL >= 4
constexpr int kRegister = 64, kBlockRows = 4, kBlockVectors = 4;
#elif FD_CPU_LEVEL == 3
constexpr int kRegister = 32, kBlockRows = 4, kBlockVectors = 2;
#else
constexpr int kRegister = 16, kBlockRows = 4, kBlockVectors = 2;
#endif
template <class C>
struct Register;
template <>
struct Register<float> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(4), gnu::may_alias]] = float;
};
template <>
struct Register<double> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(8), gnu::may_alias]] = double;
};

template <class C, class Vector>
FD_INLINE Vector fma_register(const Vector& a, const Vector& b, const Vector& c) {
#if FD_CPU_LEVEL >= 4
  if constexpr (std::is_same_v<C, float>) return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (std::is_same_v<C, double>) return (Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FD_CPU_LEVEL == 3
  if constexpr (std::is_same_v<C, float>) return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (std::is_same_v<C, double>) return (Vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  Vector sum;
  for (int l = 0; l < kRegister / static_cast<int>(sizeof(C)); ++l) sum[l] = fma_(a[l], b[l], c[l]);
  return sum;
#endif
}

template <class C, int kHeight, int kVectors>
FD_INLINE void product_block(int64_t inner, const C* a, int64_t a_stride, const C* b, int64_t b_stride, C* c,
                             int64_t c_stride) {
  using Vector = typename Register<C>::type;
  constexpr int kLanes = kRegister / sizeof(C);
  Vector sum[kHeight][kVectors];
  for (int r = 0; r < kHeight; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = *reinterpret_cast<const Vector*>(c + r * c_stride + v * kLanes);
  for (int64_t k = 0; k < inner; ++k) {
    const C* row = b + k * b_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const Vector value = Vector{} + a[r * a_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = fma_register<C, Vector>(*reinterpret_cast<const Vector*>(row + v * kLanes), value, sum[r][v]);
    }
  }
  for (int r = 0; r < kHeight; ++r)
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(c + r * c_stride + v * kLanes) = sum[r][v];
}

template <class C, int kVectors>
void product_columns(int64_t rows, int64_t inner, const C* a, int64_t a_stride, const C* b, int64_t b_stride, C* c,
                     int64_t c_stride) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows)
    product_block<C, kBlockRows, kVectors>(inner, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride);
  for (; r < rows; ++r)
    product_block<C, 1, kVectors>(inner, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride);
}

// c [rows, columns] += a [rows, inner] b [inner, columns], each element over `inner` in order, every sum rounded once;
// columns a multiple of 16.
template <class C>
void add_product(int64_t rows, int64_t columns, int64_t inner, const C* a, int64_t a_stride, const C* b,
                 int64_t b_stride, C* c, int64_t c_stride) {
  constexpr int64_t kLanes = kRegister / sizeof(C), kWidth = kBlockVectors * kLanes;
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth)
    product_columns<C, kBlockVectors>(rows, inner, a, a_stride, b + column, b_stride, c + column, c_stride);
  for (; column < columns; column += kLanes)
    product_columns<C, 1>(rows, inner, a, a_stride, b + column, b_stride, c + column, c_stride);
}

// Sum of weights, relative to `max`, that a row has seen.
template <class C>
struct Mass {
  C max = -kInf<C>, sum = 0;
};

template <class C>
FD_INLINE LaneBits<C> spread_bits(uint64_t bits) {
  LaneBits<C> lanes;
  for (int64_t l = 0; l < kWide; ++l) lanes[l] = uint64_t{1} << l;
  const LaneBits<C> all = LaneBits<C>{} + static_cast<typename Number<C>::Bits>(bits & 0xffff);
  return (LaneBits<C>)((lanes & all) != LaneBits<C>{});
}

// Turns a tile's products q.k into weights exp(score - max), 0 where not seen. Returns what earlier weights must be
// multiplied with.
template <class C>
FD_ROW C weigh(C* tile, uint64_t seen, C scale, C softcap, Mass<C>& mass) {
  Lanes<C> x[kKeys / kWide];
  LaneBits<C> broken = {};
  Lanes<C> top = Lanes<C>{} - kInf<C>;
  for (int64_t j = 0; j < kKeys / kWide; ++j) {
    x[j] = load_lanes(tile + j * kWide) * scale;
    if (softcap > 0) x[j] = detail::tanh_of<C>(x[j] / softcap) * softcap;
    if (~seen) x[j] = (Lanes<C>)(spread_bits<C>(seen >> j * kWide)) != 0 ? x[j] : Lanes<C>{} - kInf<C>;
    broken |= (LaneBits<C>)(x[j] != x[j]);
    top = larger<C>(top, x[j]);
  }
  const C before = mass.max, highest = largest<C>(top);
  mass.max = before > highest ? before : highest;
  Lanes<C> sum = {};
  for (int64_t j = 0; j < kKeys / kWide; ++j) {
    const Lanes<C> weight = exp_minus(mass.max - x[j]);
    sum = sum + weight;
    put(std::true_type{}, tile + j * kWide, weight);
  }
  for (int step = 0; step < 4; ++step) sum = add_neighbours<C>(sum, sum);
  const C fade = exp_minus(mass.max - before);
  mass.sum = mass.sum * fade + sum[0];
  // A score that is NaN or +inf has no weight above: say so here.
  if (any_bit(broken) || mass.max == kInf<C>) mass.sum = kInf<C> - kInf<C>;
  return fade;
}

// --- a task -------------------------------------------------------------------------------------------------------

// Sums of a split, or of several joined: `total` [rows, head_dim] in units of exp(max).
template <class C>
struct State {
  Mass<C>* mass;
  C* total;
};

// Buffers of one thread.
template <class C>
struct Buffers {
  C *q, *keys, *values, *weights, *row;
  State<C> part, whole;
  uint64_t* seen;

  static int64_t bytes(int64_t head_dim) {
    const int64_t row = head_dim * sizeof(C);
    return round_up(kRows * row) * 3 + round_up(kKeys * row) * 2 + round_up(kRows * kKeys * sizeof(C)) +
           round_up(16 * row) + round_up(kRows * sizeof(Mass<C>)) * 2 + round_up(kRows * 8);
  }
  Buffers(void* memory, int64_t head_dim) {
    auto* at = static_cast<std::byte*>(memory);
    auto take = [&]<class T>(T*& pointer, int64_t count) {
      pointer = reinterpret_cast<T*>(at);
      at += round_up(count * static_cast<int64_t>(sizeof(T)));
    };
    take(q, kRows * head_dim);
    take(part.total, kRows * head_dim);
    take(whole.total, kRows * head_dim);
    take(keys, kKeys * head_dim);
    take(values, kKeys * head_dim);
    take(weights, kRows * kKeys);
    take(row, 16 * head_dim);
    take(part.mass, kRows);
    take(whole.mass, kRows);
    take(seen, kRows);
  }
};

// Rows of a sequence that share one kv head: node 0 with each of its `heads`, node 1, ...
struct Block {
  Sequence s;
  int64_t kv_head, heads, first, rows;

  int64_t node(int64_t r) const { return (first + r) / heads; }
  int64_t head(int64_t r) const { return kv_head * heads + (first + r) % heads; }
};

template <class C>
struct Attend {
  const AttendArgs& a;
  const int64_t D;
  explicit Attend(const AttendArgs& args) : a(args), D(args.pages.head_dim) {}

  void load_queries(const Block& block, C* q) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t at = block.node(r) * a.q_slot_stride + block.head(r) * a.q_head_stride;
      load_plain(a.dtype, block.s.q + at * element_size(a.dtype), D, q + r * D);
    }
  }

  // Keys as [head_dim, kKeys], values as [kKeys, head_dim]; 0 where `any` is 0.
  void load_tile(const Block& block, bool ring, int64_t first, uint64_t any, Buffers<C>& use) const {
    for (int64_t key = 0; key < kKeys; ++key) {
      C* value = use.values + key * D;
      if (any >> key & 1) {
        load_key(a, block.s, ring, first + key, block.kv_head, use.row);
        load_value(a, block.s, ring, first + key, block.kv_head, value);
      } else {
        std::fill_n(use.row, D, C(0));
        std::fill_n(value, D, C(0));
      }
      for (int64_t d = 0; d < D; ++d) use.keys[d * kKeys + key] = use.row[d];
    }
  }

  void add_tile(const Block& block, bool ring, int64_t first, Buffers<C>& use) const {
    const Sequence& s = block.s;
    uint64_t any = 0;
    const int64_t first_node = block.node(0);
    for (int64_t node = first_node; node <= block.node(block.rows - 1); ++node) {
      const int64_t coded = s.coded ? s.coded[node] : s.coded_end;
      const uint64_t stored = ring ? bits_between(coded - first, kKeys) : bits_between(0, coded - first);
      any |= use.seen[node - first_node] = s.seen(node, first) & stored;
    }
    if (!any) return;
    load_tile(block, ring, first, any, use);
    const int64_t rows = block.rows;
    std::fill_n(use.weights, rows * kKeys, C(0));
    add_product<C>(rows, kKeys, D, use.q, D, use.keys, kKeys, use.weights, kKeys);
    for (int64_t r = 0; r < rows; ++r) {
      const C fade = weigh<C>(use.weights + r * kKeys, use.seen[block.node(r) - first_node], static_cast<C>(a.scale),
                              static_cast<C>(a.softcap), use.part.mass[r]);
      C* total = use.part.total + r * D;
      for (int64_t d = 0; d < D; ++d) total[d] *= fade;
    }
    add_product<C>(rows, D, kKeys, use.weights, kKeys, use.values, D, use.part.total, D);
  }

  // Keys kSplit * split and on, into use.part.
  void add_split(const Block& block, int64_t split, Buffers<C>& use) const {
    clear(use.part, block.rows);
    const int64_t begin = split * kSplit, end = std::min(begin + kSplit, block.s.length);
    for (int64_t first = begin; first < end; first += kKeys) {
      if (first < block.s.coded_end) add_tile(block, /*ring=*/false, first, use);
      if (first + kKeys > block.s.coded_begin) add_tile(block, /*ring=*/true, first, use);
    }
  }

  void clear(const State<C>& state, int64_t rows) const {
    std::fill_n(state.mass, rows, Mass<C>{});
    std::fill_n(state.total, rows * D, C(0));
  }

  void join(const State<C>& to, const State<C>& from, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      Mass<C>&left = to.mass[r], &right = from.mass[r];
      const C max = left.max > right.max ? left.max : right.max;
      const C fade = exp_minus(max - left.max), weight = exp_minus(max - right.max);
      left = {max, left.sum * fade + right.sum * weight};
      C *total = to.total + r * D, *part = from.total + r * D;
      for (int64_t d = 0; d < D; ++d) total[d] = total[d] * fade + part[d] * weight;
    }
  }

  void write(const Block& block, const State<C>& state) const {
    dispatch_logits(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<Compute<T>, C>) {
        for (int64_t r = 0; r < block.rows; ++r) {
          const int64_t index = (block.s.first_row + block.node(r)) * a.num_q_heads + block.head(r);
          const Mass<C> mass = state.mass[r];
          const C inverse = mass.sum == 0 ? C(0) : C(1) / mass.sum;
          static_cast<C*>(a.lse)[index] = mass.sum == mass.sum ? mass.max + log_(mass.sum) : mass.sum;
          T* out = static_cast<T*>(a.out) + index * D;
          const C* total = state.total + r * D;
          for (int64_t d = 0; d < D; ++d)
            out[d] = store<T, false>(total[d] * inverse + C(0));  // never -0: keys not seen add 0
        }
      }
    });
  }

  void write_nothing(int64_t row, int64_t count) const {
    std::memset(static_cast<std::byte*>(a.out) + row * a.num_q_heads * D * element_size(a.dtype), 0,
                count * a.num_q_heads * D * element_size(a.dtype));
    std::fill_n(static_cast<C*>(a.lse) + row * a.num_q_heads, count * a.num_q_heads, -kInf<C>);
  }
};

// How a call is cut into tasks.
struct Plan {
  int64_t heads, num_blocks, num_splits, threads;  // heads: per kv head; blocks: of a sequence and kv head, at most
  bool by_split;                                   // a task is one split, its state is kept

  int64_t blocks(const AttendArgs& a) const { return a.batch * a.pages.num_heads * num_blocks; }

  Plan(const AttendArgs& a, const Exec& ex) {
    heads = a.pages.num_heads ? a.num_q_heads / a.pages.num_heads : 1;
    int64_t most_nodes = 0, most_keys = 0, work = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t nodes = a.group_start   ? int64_t{a.group_start[b + 1]} - a.group_start[b]
                      : a.num_queries ? a.num_queries[b]
                                      : a.num_slots;
      nodes = std::clamp<int64_t>(nodes, 0, a.group_start ? a.num_rows : a.num_slots);
      const int64_t keys = std::clamp<int64_t>(a.kv_lens[b], 0, a.max_pages * a.pages.page_size + a.pages.tail_size);
      most_nodes = std::max(most_nodes, nodes);
      most_keys = std::max(most_keys, keys);
      work += nodes * (a.window ? std::min(keys, a.window + nodes) : keys);
    }
    num_blocks = ceil_div(most_nodes * heads, kRows);
    num_splits = ceil_div(most_keys, kSplit);
    work *= a.num_q_heads * a.pages.head_dim;
    threads = std::clamp<int64_t>(work / kMacsPerThread, 1, ex.num_threads);
    by_split = threads > 1 && num_splits > 1 && blocks(a) < 4 * threads;
    threads = std::clamp<int64_t>(blocks(a) * (by_split ? num_splits : 1), 1, threads);
  }
};

template <class C>
int64_t state_bytes(const AttendArgs& a) {
  return round_up(kRows * a.pages.head_dim * sizeof(C)) + round_up(kRows * sizeof(Mass<C>));
}

template <class C>
int64_t scratch_bytes(const AttendArgs& a, const Exec& ex) {
  const Plan plan(a, ex);
  return 64 + plan.threads * Buffers<C>::bytes(a.pages.head_dim) +
         (plan.by_split ? plan.blocks(a) * plan.num_splits * state_bytes<C>(a) : 0);
}

// body(i, slot) for i in [0, count) on `threads` threads, which take the next one as they finish.
template <class Body>
void for_each_task(const Exec& ex, int64_t threads, int64_t count, const Body& body) {
  int64_t next = 0;
  auto run = [&](int64_t slot) {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) return;
      body(i, slot);
    }
  };
  if (threads == 1) return run(0);
  auto call = [](void* context, int64_t slot) { (*static_cast<decltype(run)*>(context))(slot); };
  ex.parallel_for(threads, call, &run);
}

template <class C>
void run(const AttendArgs& a, const Exec& ex) {
  const Attend<C> attend(a);
  const Plan plan(a, ex);
  auto* memory = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<int64_t>(a.scratch)));
  const int64_t buffer_bytes = Buffers<C>::bytes(a.pages.head_dim);
  std::byte* states = memory + plan.threads * buffer_bytes;

  if (a.group_start) attend.write_nothing(0, a.num_rows);
  for (int64_t b = 0; b < a.batch; ++b) {
    a.status[b] = check(a, b);
    if (a.group_start) continue;
    const int64_t used = a.status[b] ? 0 : a.num_queries ? a.num_queries[b] : a.num_slots;
    attend.write_nothing(b * a.num_slots + used, a.num_slots - used);
  }

  // False where there is nothing to do.
  auto block_of = [&](int64_t i, Block& block) {
    const int64_t head = i % a.pages.num_heads, rest = i / a.pages.num_heads;
    const int64_t b = rest / plan.num_blocks, first = rest % plan.num_blocks * kRows;
    if (a.status[b]) return false;
    block = {sequence_of(a, b), head, plan.heads, first, 0};
    block.rows = std::min(kRows, block.s.num_nodes * plan.heads - first);
    return block.rows > 0;
  };
  auto state_of = [&](int64_t i) {
    std::byte* at = states + i * state_bytes<C>(a);
    return State<C>{reinterpret_cast<Mass<C>*>(at + round_up(kRows * a.pages.head_dim * sizeof(C))),
                    reinterpret_cast<C*>(at)};
  };
  const int64_t blocks = plan.blocks(a);
  if (plan.by_split) {
    for_each_task(ex, plan.threads, blocks * plan.num_splits, [&](int64_t i, int64_t slot) {
      Block block;
      if (!block_of(i / plan.num_splits, block) || i % plan.num_splits * kSplit >= block.s.length) return;
      Buffers<C> use(memory + slot * buffer_bytes, a.pages.head_dim);
      use.part = state_of(i);
      attend.load_queries(block, use.q);
      attend.add_split(block, i % plan.num_splits, use);
    });
  }
  for_each_task(ex, plan.by_split ? 1 : plan.threads, blocks, [&](int64_t i, int64_t slot) {
    Block block;
    if (!block_of(i, block)) return;
    Buffers<C> use(memory + slot * buffer_bytes, a.pages.head_dim);
    attend.clear(use.whole, block.rows);
    if (!plan.by_split) attend.load_queries(block, use.q);
    for (int64_t split = 0; split * kSplit < block.s.length; ++split) {
      if (plan.by_split) {
        use.part = state_of(i * plan.num_splits + split);
      } else {
        attend.add_split(block, split, use);
      }
      attend.join(use.whole, use.part, block.rows);
    }
    attend.write(block, use.whole);
  });
}

}  // namespace

void attend(const AttendArgs& a, const Exec& ex) {
  if (a.dtype == DType::kFloat64) return run<double>(a, ex);
  run<float>(a, ex);
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::attend_scratch_bytes(const AttendArgs& a, const Exec& ex) {
  if (a.dtype == DType::kFloat64) return FD_ISA::scratch_bytes<double>(a, ex);
  return FD_ISA::scratch_bytes<float>(a, ex);
}
#endif
