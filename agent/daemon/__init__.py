"""The agent process: start and stop, state, and the interfaces that publish it (socket, HTTP, event log)."""
