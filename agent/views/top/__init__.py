"""`udpwatch top`: what is shown of a node, or of all of them, and how it is kept up to date."""
