"""Which UDP servers exist, and what would go wrong with them."""
