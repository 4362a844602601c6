"""The network namespaces and the small servers of the demo and the tests."""
