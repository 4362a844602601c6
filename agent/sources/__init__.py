"""Sources of findings: the kernel's sensor, and a recording in its place."""
