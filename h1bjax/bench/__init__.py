"""How fast whole models decode, and in how much memory."""
