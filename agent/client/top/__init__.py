"""`udpwatch top`: a live view of one node, or of all nodes by way of Prometheus."""
