"""`charonia bench`: what an engine does on this machine, with random token ids."""
