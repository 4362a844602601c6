"""udpwatch: finds UDP replies that leave a node from another address than the one the client asked."""

__version__ = "0.1.0"
