"""The BPF programs, as data: compiled on the node when udpwatch starts."""
