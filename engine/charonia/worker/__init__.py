"""What runs on the device: rows, batches, attention, sampling, and the runner that ties them together."""
