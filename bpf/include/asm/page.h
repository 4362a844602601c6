/* SPDX-License-Identifier: GPL-2.0-only */
/* Asked for by bcc. PAGE_SIZE, the running kernel's, comes with the compile. */
