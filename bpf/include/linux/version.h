/* SPDX-License-Identifier: GPL-2.0-only */
/* Asked for by bcc; nothing in it is used. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
