"""Healing: replies leave from the address that the peer asked."""
