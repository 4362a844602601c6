/* SPDX-License-Identifier: GPL-2.0-only */
/* Asked for by bcc; nothing in it is used. */
