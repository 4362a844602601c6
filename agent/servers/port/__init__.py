"""Why UDP to one port does not work: look (the kernel), case and statements (pure)."""
