"""What touches the kernel: programs, maps, netlink, namespaces, capabilities."""
