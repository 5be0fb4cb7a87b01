"""How user code is found, and how it runs in processes of its own."""
