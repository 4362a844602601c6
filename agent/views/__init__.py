"""What people and programs see: each view reads a Snapshot or an Event and knows nothing of the kernel."""
