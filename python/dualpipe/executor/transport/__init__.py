"""How messages move between ranks: one small class for each way."""
