// CUDA's built-in vector types, with its sizes and alignments.
#pragma once

#define FD_SIMT_VECTOR2(Name, T, alignment)      \
  struct alignas(alignment) Name##2 { T x, y; }; \
  constexpr Name##2 make_##Name##2(T x, T y) { return {x, y}; }
#define FD_SIMT_VECTOR3(Name, T) \
  struct Name##3 { T x, y, z; }; \
  constexpr Name##3 make_##Name##3(T x, T y, T z) { return {x, y, z}; }
#define FD_SIMT_VECTOR4(Name, T, alignment)            \
  struct alignas(alignment) Name##4 { T x, y, z, w; }; \
  constexpr Name##4 make_##Name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define FD_SIMT_VECTORS(Name, T)            \
  FD_SIMT_VECTOR2(Name, T, (2 * sizeof(T))) \
  FD_SIMT_VECTOR3(Name, T)                  \
  FD_SIMT_VECTOR4(Name, T, (4 * sizeof(T)))

FD_SIMT_VECTORS(char, signed char)
FD_SIMT_VECTORS(uchar, unsigned char)
FD_SIMT_VECTORS(short, short)
FD_SIMT_VECTORS(ushort, unsigned short)
FD_SIMT_VECTORS(int, int)
FD_SIMT_VECTORS(uint, unsigned)
FD_SIMT_VECTORS(float, float)
FD_SIMT_VECTOR2(longlong, long long, 16)
FD_SIMT_VECTOR2(ulonglong, unsigned long long, 16)
FD_SIMT_VECTOR2(double, double, 16)

#undef FD_SIMT_VECTORS
#undef FD_SIMT_VECTOR4
#undef FD_SIMT_VECTOR3
#undef FD_SIMT_VECTOR2

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
