/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef UDPWATCH_SHIM_TYPES_H
#define UDPWATCH_SHIM_TYPES_H

typedef __UINT8_TYPE__ __u8;
typedef __UINT16_TYPE__ __u16;
typedef __UINT32_TYPE__ __u32;
typedef unsigned long long __u64;
typedef __INT8_TYPE__ __s8;
typedef __INT16_TYPE__ __s16;
typedef __INT32_TYPE__ __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u16 __sum16;
typedef __u32 __wsum;

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef s32 pid_t;
typedef _Bool bool;

#define __always_inline inline __attribute__((always_inline))
#define true  1
#define false 0
#define NULL  ((void *)0)

#define __aligned_u64 __u64 __attribute__((aligned(8)))

#endif
