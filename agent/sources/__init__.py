"""Sources of findings: the sensor of this kernel, and a recording."""
