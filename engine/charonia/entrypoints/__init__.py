"""Front doors: the offline `LLM`, the command `charonia`, and what launches and watches the Triton server."""
