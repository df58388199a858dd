"""`charonia bench serve`: load for a running server, and how long its answers take."""
