"""`udpwatch top`: what it shows of one node or of all nodes, and how it stays up to date."""
