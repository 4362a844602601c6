"""From numbers to names: each module one lookup and one bounded cache. A miss is a value, never an error."""
