"""What executes an engine that is built for one machine: the export verifies it, the service runs it. No torch."""
