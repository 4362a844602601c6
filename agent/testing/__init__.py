"""Network namespaces, small servers and child processes for the demo and the tests."""
