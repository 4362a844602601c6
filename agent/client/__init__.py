"""Read from a running agent over its socket, and format what `events`, `explain` and `top` print."""
