"""The Triton adapter: Triton tensors to engine requests and back, cancellation, metrics, readiness, drain."""
