"""The engine process, its wire, and the frontends' side of it."""
