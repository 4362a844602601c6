"""What reads a running agent: its socket, and what `events`, `explain` and `top` show."""
